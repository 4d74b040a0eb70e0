"""One rank of two that save under a watchdog, where the disk of rank 1 is slow, or takes no more after a while."""

import os
import threading
import time
from pathlib import Path

import torch.distributed as dist

from megadit import engines
from megadit.distributed import process_group
from megadit.recipe import Recipe
from megadit.training import checkpoint
from megadit.training.ema import Averages
from megadit.training.watchdog import Watchdog


def main(recipe: Recipe, run: Path, limit: float, seconds: float, hangs: bool) -> str | None:
    """What the watchdog of this rank said, if anything, of a save that takes rank 1 `seconds`, if it ends."""
    said: list[Exception] = []
    told = threading.Event()

    def end(error: Exception) -> None:
        said.append(error)
        told.set()

    write, started = os.pwrite, time.monotonic()

    def slow_write(descriptor: int, data: memoryview, start: int) -> int:
        if time.monotonic() - started < seconds:
            time.sleep(limit / 10)
        elif hangs:
            assert told.wait(60)
        return write(descriptor, data, start)

    with process_group(needed=True) as topology:
        engine = engines.build(recipe, topology)
        if topology.rank == 1:
            os.pwrite = slow_write
        dist.barrier()
        with (
            Watchdog(limit, run / "stalls", end, topology) as watchdog,
            checkpoint.Saver(run, recipe, engine, Averages(engine.shards, [0.9]), watchdog) as saver,
        ):
            watchdog.mark(1, "checkpoint")
            started = time.monotonic()
            saver.save(images_seen=16, num_steps=1)
    return str(said[0]) if said else None
