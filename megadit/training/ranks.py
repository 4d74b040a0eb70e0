"""The process group of a training run, and the few things ranks do together."""

import os
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
    store = None
    if "RANK" not in os.environ:
        store = dist.HashStore()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=0 if store else -1,
        world_size=1 if store else -1,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield
        dist.barrier()  # without it gloo's teardown aborts one time in six (measured; pytorch issue 190489)
    finally:
        dist.destroy_process_group()


def on_first_rank(function: Callable[[], Result]) -> Result:
    """Run `function` on rank 0 and give its result, or its error, to every rank."""
    if world_size() == 1:
        return function()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except Exception as error:  # handed to every rank, raised below
            box[1] = error
    dist.broadcast_object_list(box, src=0)
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
