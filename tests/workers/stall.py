"""One rank of two under a watchdog: rank 1 hangs before a collective in which rank 0 waits for it."""

import threading
from pathlib import Path

import torch
import torch.distributed as dist

from megadit.distributed import process_group
from megadit.training.watchdog import Watchdog


def main(limit: float, folder: Path) -> str | None:
    """What the watchdog of this rank said, if anything."""
    said: list[Exception] = []
    told = threading.Event()

    def end(error: Exception) -> None:
        said.append(error)
        told.set()

    with process_group(needed=True) as topology, Watchdog(limit, folder, end, topology) as watchdog:
        for step in range(3):
            watchdog.mark(step, "data")
            dist.all_reduce(torch.zeros(1))
            watchdog.mark(step, "forward")
        assert not said
        watchdog.mark(3, "data")
        if topology.rank == 1:
            assert told.wait(20 * limit)
        watchdog.mark(3, "forward")
        dist.barrier()
    return str(said[0]) if said else None
