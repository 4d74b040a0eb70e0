"""The process group of a training run, and the few things ranks do together."""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(needed: bool, timeout_seconds: float = 600) -> Iterator[None]:
    """Join the ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, where there are several.

    `needed` makes a group of one, too: engines that shard want one on a single rank. A collective that takes longer
    than `timeout_seconds` fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not needed:
        yield
        return
    store: dist.Store | None = None
    if "RANK" not in os.environ:
        store = dist.HashStore()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _store_of_this_start(timedelta(seconds=timeout_seconds))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield
        dist.barrier()  # without it gloo's teardown aborts one time in six (measured; pytorch issue 190489)
    finally:
        dist.destroy_process_group()


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


def on_first_rank(function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Run `function` on rank 0 and give its result, or its error, to every rank.

    `group` is another one of all ranks to do so on.
    """
    if world_size() == 1:
        return function()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except Exception as error:  # handed to every rank, raised below
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1]
    return box[0]


def on_every_rank(function: Callable[[], Result]) -> list[Result]:
    """Run `function` on every rank and give all results, by rank, or the first rank's error, to every rank."""
    if world_size() == 1:
        return [function()]
    box: tuple[Result | None, Exception | None]
    try:
        box = function(), None
    except Exception as error:  # handed to every rank, raised below: the others must not wait for this one
        box = None, error
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, box)
    for _, raised in boxes:
        if raised is not None:
            raise raised
    return [result for result, _ in boxes]
