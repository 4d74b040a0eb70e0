"""What processes of the data plane take: memory while they stream, time and memory for the order of SA-1B.

Each piece runs in a process of its own: what has been freed in an old one says nothing.
"""

import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil

from megadit.data.format.index import Index
from megadit.data.format.manifest import FORMAT_VERSION, ImageFacts, Manifest, ShardFacts
from megadit.data.loading.chunks import ChunkReader
from megadit.data.loading.loader import Loader
from megadit.data.loading.schedule import Schedule
from megadit.recipe import Data

T = TypeVar("T")
SA1B_SAMPLES, SA1B_RANKS = 11_000_000, 1024
ORDER_STEPS = 20
PIXELS = 256


def run_elsewhere(work: Callable[..., T], *arguments: object) -> T:
    """What `work` returns in a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def growth_bytes(index_url: str, seconds: float, memory_mb: int, workers: int = 0) -> int:
    """The most that the resident memory of this process and its workers grows by while they stream for so long.

    From what a process has that opened the data set and read nothing of it. What a worker passes to this process is
    counted in both.
    """
    data = Data(
        url=index_url,
        num_streams=2,
        chunk_samples=8,
        chunks_per_group=8,
        resolution=PIXELS,
        memory_mb=memory_mb,
        num_workers=workers,
    )
    opened = 0
    if workers:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["megadit.data.loading.loader"])  # as the stream does
        with ProcessPoolExecutor(1, server) as pool:
            opened = pool.submit(_opened_bytes, index_url).result()
    batches, most = Loader(data, 0, 16, 0, 1).iterate(0), 0
    before, end = _tree_bytes(opened), time.monotonic() + seconds
    while time.monotonic() < end:
        next(batches)
        most = max(most, _tree_bytes(opened) - before)
    batches.close()
    return most


def _opened_bytes(index_url: str) -> int:
    """What a worker has before it reads samples."""
    reader = ChunkReader(index_url)
    resident = psutil.Process().memory_info().rss
    reader.close()
    return resident


def _tree_bytes(opened: int) -> int:
    """Resident memory of this process, and what workers have beyond `opened` bytes each."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children():  # the fork server; the workers are its own
        for worker in child.children():
            total += worker.memory_info().rss - opened
    return total


def simulate_order() -> tuple[list[float], list[float], int]:
    """Milliseconds of each of some steps for one rank and for all, and the most bytes that this process ever had."""
    each = SA1B_SAMPLES // 8
    shards = tuple(
        ShardFacts(name=str(number), num_samples=each, num_bytes=0, bucket=f"{256 + 16 * number}x256")
        for number in range(8)
    )
    manifest = Manifest(
        version=FORMAT_VERSION,
        name="order",
        inputs="",
        num_samples=8 * each,
        members=("png",),
        image=ImageFacts(),
        shards=shards,
        index={},
    )
    data = Data(url="", num_streams=SA1B_RANKS, chunk_samples=16, chunks_per_group=4)
    schedule = Schedule(manifest, Index(np.zeros(0), {}), data, 0, 4 * SA1B_RANKS)

    def of_one_rank(step: int) -> None:
        which, number = schedule.locate(step)
        schedule.buckets[which].order.stream_samples(77, number * schedule.share, schedule.share)

    def milliseconds(work: Callable[[int], object], step: int) -> float:
        start = time.perf_counter()
        work(step)
        return 1000 * (time.perf_counter() - start)

    # Each in another epoch: nothing is kept from the one before.
    steps = range(0, ORDER_STEPS * 12_345, 12_345)
    one_rank, all_ranks = ([milliseconds(work, step) for step in steps] for work in (of_one_rank, schedule.step))
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return one_rank, all_ranks, 1024 * int(peak[1])
