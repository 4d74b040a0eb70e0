"""Joining the ranks that a launcher started."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megadit.distributed.topology import Axis, Topology


@contextmanager
def process_group(needed: bool, timeout_seconds: float = 600, num_replicas: int = 1) -> Iterator[Topology]:
    """Join the ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, where there is RANK.

    `megadit.launcher.environment` writes them. `needed` makes a group of one, too: engines that shard want one on a
    single rank. A collective that takes longer than `timeout_seconds` fails. Raises ValueError for ranks that are no
    multiple of `num_replicas`, which each hold the whole model.
    """
    launched = "RANK" in os.environ
    rank, size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)
    if size % num_replicas:
        raise ValueError(f"engine.num_replicas {num_replicas} does not divide the {size} ranks")
    if size == 1 and not needed:
        yield Topology()
        return
    store: dist.Store | None = None
    if not launched:
        store = dist.HashStore()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _store_of_this_start(timedelta(seconds=timeout_seconds))
    if launched and torch.cuda.is_available():
        take_gpu()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield Topology(shard=Axis(rank, size), joined=True).with_replicas(num_replicas)
        dist.barrier()  # without it gloo's teardown aborts one time in six (measured; pytorch issue 190489)
    finally:
        dist.destroy_process_group()


def take_gpu() -> None:
    """Make this rank's GPU the current one: that of LOCAL_RANK, or the only one that is visible.

    Raises ValueError for a local rank that none is left for.
    """
    local_rank, num_visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if 1 < num_visible <= local_rank:
        raise ValueError(f"this is local rank {local_rank}, and {num_visible} GPUs are visible: start fewer ranks")
    torch.cuda.set_device(local_rank if num_visible > 1 else 0)


def _store_of_this_start(timeout: timedelta) -> dist.Store:
    """A part of torchrun's store that is new, and the same on every rank.

    The store outlives the ranks: those that torchrun starts again find there the addresses of the dead (pytorch issue
    135712). TORCHELASTIC_RESTART_COUNT does not tell starts apart, since each node counts its own. So rank 0 makes up
    a name, and answers whoever asks for it, the dead too, until all the others have said that they know it.
    """
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store = dist.PrefixStore("megadit", store)
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"question/{rank}", mine)
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/known/{rank}", "")
        return dist.PrefixStore(name, store)
    others = range(1, world_size)
    deadline = time.monotonic() + timeout.total_seconds()
    while not store.check([f"{mine}/known/{other}" for other in others]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {world_size} ranks have joined after {timeout.total_seconds():.0f} s")
        for other in others:
            if store.check([f"question/{other}"]):
                store.set(f"answer/{store.get(f'question/{other}').decode()}", mine)
        time.sleep(0.05)
    return dist.PrefixStore(mine, store)
