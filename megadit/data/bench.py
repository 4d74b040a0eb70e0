"""The speed of the data plane beside what else there is, on this machine, in one run, from the same files.

    python -m megadit.data.bench [--samples 144] [--rounds 3] [--minutes 0]

A SeaweedFS server is started, with SA-1B-shaped shards and shards of latents. Pieces of work that are compared
alternate; a ratio is the median over the rounds. "per core" counts the processor time of this process, its threads
included. With --minutes, pictures are streamed for that long and the memory of the process is watched.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import webdataset
from PIL import Image
from webdataset.gopen import gopen_schemes

from megadit import timing
from megadit.data import sa1b_like
from megadit.data.decode import decode_picture
from megadit.data.fetch import FETCH_THREADS, Supply, largest_chunks
from megadit.data.index import PLACE, Index
from megadit.data.indexing.dataset import index
from megadit.data.local_s3 import LocalS3
from megadit.data.manifest import FORMAT_VERSION, LATENT, MANIFEST_NAME, ImageFacts, LatentFacts, Manifest, Shard
from megadit.data.reader import Reader
from megadit.data.schedule import Schedule
from megadit.data.storage import open_store
from megadit.data.stream import Stream
from megadit.recipe import Data

BUCKET, SAMPLES_PER_TAR, SHORT_SIDE, PIXELS = "bench", 48, 1500, 256
PASSES = 10  # over the data, in one piece of work
CHUNKS_AHEAD = 4
MEMORY_MB = 400
LATENT_SHARDS, LATENTS_PER_SHARD, LATENT_SHAPE = 4, 4096, (4, 32, 32)
SA1B_SAMPLES, SA1B_RANKS = 11_000_000, 1024


@dataclass(frozen=True)
class Row:
    """One line of the table: what ours does, beside a baseline or an aim of its own."""

    what: str
    ours: str
    baseline: str
    ratio: float
    aim: float

    def cells(self) -> tuple[str, ...]:
        verdict = "reached" if self.ratio >= self.aim else "missed"
        return self.what, self.ours, self.baseline, f"{self.ratio:.2f}", f"{self.aim:g}", verdict


def alternate(
    ours: Callable[[], int], theirs: Callable[[], int], clock: Callable[[], float], rounds: int
) -> tuple[float, float, float]:
    """Samples a second of both, and the median ratio. The pieces of work return how many samples they had."""
    rates = []
    for number in range(rounds + 1):
        found = {}
        for work in (ours, theirs) if number % 2 else (theirs, ours):
            start = clock()
            found[work] = work() / (clock() - start)
        rates.append((found[ours], found[theirs]))
    rates = rates[1:]  # the first round is the warm-up
    medians = [statistics.median(rate[which] for rate in rates) for which in (0, 1)]
    return medians[0], medians[1], statistics.median(one / other for one, other in rates)


# Pictures from S3, undecoded


def raw_rows(url: str, index_url: str, rounds: int) -> list[Row]:
    """Samples a second that arrive, beside GETs of whole shards and webdataset."""
    manifest = Manifest.load(index_url)
    data = Data(url=index_url, num_streams=1, chunk_samples=16, chunks_per_group=2, resolution=PIXELS)
    ours, names = _supply_work(data, PASSES), [shard.name for shard in manifest.shards] * PASSES
    store = open_store(url)

    def whole_shards() -> int:
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            assert sum(map(len, pool.map(store.get, names))) == PASSES * sum(item.num_bytes for item in manifest.shards)
        return PASSES * manifest.num_samples

    def webdataset_samples() -> int:
        urls = [f"{url}/{name}" for name in names]
        found = sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))
        assert found == PASSES * manifest.num_samples
        return found

    rows = []
    for what, theirs, aim in (("whole shards by GET", whole_shards, 0.9), ("webdataset", webdataset_samples, 1.3)):
        one, other, ratio = alternate(ours, theirs, time.perf_counter, rounds)
        rows.append(Row(f"undecoded samples/s, {what}", f"{one:.0f}", f"{other:.0f}", ratio, aim))
    return rows


def _supply_work(data: Data, passes: int) -> Callable[[], int]:
    """Some epochs' samples out of a supply that begins anew and reads ahead as little as keeps it busy."""
    reader = Reader(data.url, data.client)
    schedule = Schedule(reader.manifest, reader.index, data, 0, data.chunk_samples)
    num_steps = passes * schedule.buckets[0].order.epoch_samples // data.chunk_samples
    limit = (data.chunks_per_group + CHUNKS_AHEAD) * max(largest_chunks(reader, schedule))
    starts = count(step=num_steps)

    def work() -> int:
        supply = Supply(reader, schedule, range(1), next(starts), limit)
        found = 0
        for _ in range(num_steps):
            found += sum(item.chunk.contents[item.place] is not None for item in supply.step())
        supply.close()
        return found

    return work


def open_s3(url: str, mode: str = "rb", bufsize: int = 8192, **options: Any) -> Any:
    """What webdataset opens a shard with: the body of one GET by boto3."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"]


# Decoding


def decode_row(index_url: str, rounds: int) -> Row:
    """Pictures of 1500 pixels brought to 256, beside decoding them whole."""
    reader = Reader(index_url)
    pictures = [
        bytes(members["jpg"]) for members in reader.read(np.arange(min(24, reader.manifest.num_samples))).values()
    ]

    def ours() -> int:
        for data in pictures:
            decode_picture(data, PIXELS, PIXELS)
        return len(pictures)

    def naive() -> int:
        for data in pictures:
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            scale = PIXELS / min(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            left, top = (size[0] - PIXELS) // 2, (size[1] - PIXELS) // 2
            np.asarray(picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + PIXELS, top + PIXELS)))
        return len(pictures)

    one, other, ratio = alternate(ours, naive, time.process_time, rounds)
    return Row(f"decoded to {PIXELS} px per core, whole decode", f"{one:.0f}/s", f"{other:.0f}/s", ratio, 4.0)


# Latents


def write_latents(folder: Path) -> None:
    """Shards of random latents of 8 KB, as `megadit data pack` writes them."""
    draws, keys = np.random.default_rng(0), list[str]()
    places, shards = list[tuple[int, int, int]](), list[Shard]()
    store = open_store(str(folder))
    for number in range(LATENT_SHARDS):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(LATENTS_PER_SHARD):
                array = io.BytesIO()
                np.save(array, draws.standard_normal(LATENT_SHAPE, dtype=np.float32).astype(np.float16))
                info = tarfile.TarInfo(f"{len(keys):08d}.{LATENT}")
                info.size = len(array.getvalue())
                places.append((tar.offset + tarfile.BLOCKSIZE, info.size, zlib.crc32(array.getvalue())))
                keys.append(f"{len(keys):08d}")
                tar.addfile(info, io.BytesIO(array.getvalue()))
        name, data = f"shard-{number}.tar", buffer.getvalue()
        store.put(name, data)
        shards.append(Shard(name=name, num_samples=LATENTS_PER_SHARD, num_bytes=len(data), bucket="256x256"))
    facts = LatentFacts(
        encoder="", weights_sha256="", channels=4, downsampling=8, moments=False, scaling_factor=1, shift_factor=0
    )
    columns = Index(np.array(keys, dtype=np.bytes_), {LATENT: np.array(places, dtype=PLACE)})
    manifest = Manifest(
        version=FORMAT_VERSION,
        name="latents",
        inputs="",
        num_samples=len(keys),
        members=(LATENT,),
        latent=facts,
        shards=tuple(shards),
        index=columns.write(store),
    )
    store.put(MANIFEST_NAME, manifest.sealed().dump())


def latent_row(folder: Path, rounds: int) -> Row:
    """Latents in the order of training, beside webdataset's in the order of the files; neither is decoded."""
    ours = _supply_work(Data(url=str(folder), num_streams=1, chunk_samples=1024, chunks_per_group=2), PASSES)
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]

    def theirs() -> int:
        return sum(1 for _ in webdataset.WebDataset(paths * PASSES, shardshuffle=False))

    one, other, ratio = alternate(ours, theirs, time.process_time, rounds)
    return Row("8 KB latents per core, webdataset", f"{one:.0f}/s", f"{other:.0f}/s", ratio, 3.0)


# Start and order


def resume_row(index_url: str) -> Row:
    """Seconds from nothing to the first decoded batch of a step in the middle of a group."""
    data = Data(url=index_url, num_streams=1, chunk_samples=16, chunks_per_group=2, resolution=PIXELS)
    start = time.perf_counter()
    batches = Stream(data, 0, 8, 0, 1).iterate(1001)
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return Row("seconds to the first batch after a resume", f"{seconds:.2f}", "2", 2 / seconds, 1.0)


def order_rows() -> list[Row]:
    """The order of 11 million samples of eight resolutions, for one of 1024 ranks and for all of them."""
    each = SA1B_SAMPLES // 8
    shards = tuple(
        Shard(name=str(number), num_samples=each, num_bytes=0, bucket=f"{256 + 16 * number}x256") for number in range(8)
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

    rows = []
    for what, work in (("one rank's", of_one_rank), ("the global", schedule.step)):
        milliseconds = []
        for step in range(0, 20 * 12_345, 12_345):  # each in another epoch: nothing is kept from the one before
            start = time.perf_counter()
            work(step)
            milliseconds.append(1000 * (time.perf_counter() - start))
        rows.append(
            Row(
                f"ms for {what} order of any step, median (largest {max(milliseconds):.0f}, cold ones included)",
                f"{statistics.median(milliseconds):.1f}",
                "50",
                50 / statistics.median(milliseconds),
                1.0,
            )
        )
    return rows


def memory_row(index_url: str, minutes: float) -> Row:
    """What a new process grows by while it streams, beside data.memory_mb."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        most = pool.submit(growth_bytes, index_url, 60 * minutes, MEMORY_MB).result()
    ratio = MEMORY_MB * 1e6 / most
    return Row(f"MB in {minutes:g} minutes, data.memory_mb", f"{most / 1e6:.0f}", f"{MEMORY_MB}", ratio, 1 / 1.2)


def growth_bytes(index_url: str, seconds: float, memory_mb: int) -> int:
    """The most that the resident memory of this process grows by while pictures are streamed for so long."""
    data = Data(
        url=index_url, num_streams=2, chunk_samples=8, chunks_per_group=8, resolution=PIXELS, memory_mb=memory_mb
    )
    process, most = psutil.Process(), 0
    batches = Stream(data, 0, 16, 0, 1).iterate(0)
    before, end = process.memory_info().rss, time.monotonic() + seconds
    while time.monotonic() < end:
        next(batches)
        most = max(most, process.memory_info().rss - before)
    batches.close()
    return most


def format_table(rows: list[Row]) -> str:
    """Aligned text."""
    table = [("what, beside", "ours", "beside", "ratio", "aim", ""), *(row.cells() for row in rows)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table)


def measure(folder: Path, samples: int, rounds: int, minutes: float) -> Iterator[Row]:
    """All rows; files are written below `folder`."""
    with LocalS3(folder / "s3") as server:
        os.environ |= server.environment
        server.create_bucket(BUCKET)
        url, index_url = f"s3://{BUCKET}/tars", f"s3://{BUCKET}/index"
        sa1b_like.make(url, samples, samples_per_tar=SAMPLES_PER_TAR, short_side=SHORT_SIDE, num_masks=100)
        index(url, index_url)
        gopen_schemes["s3"] = open_s3
        yield from raw_rows(url, index_url, rounds)
        yield decode_row(index_url, rounds)
        write_latents(folder / "latents")
        yield latent_row(folder / "latents", rounds)
        yield resume_row(index_url)
        yield from order_rows()
        if minutes:
            yield memory_row(index_url, minutes)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=144, help="pictures of 1500 pixels, 0.8 MB each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=0, help="how long memory is watched")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megadit-bench-") as folder:
        rows = list(measure(Path(folder), arguments.samples, arguments.rounds, arguments.minutes))
    print(f"{timing.machine()}, {os.cpu_count()} cores, one process\n{format_table(rows)}")


if __name__ == "__main__":
    main()
