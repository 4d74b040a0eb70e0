"""`megadit bench data`: the speed of the data plane beside what else there is, from the same files.

A SeaweedFS server is started, with SA-1B-shaped shards and shards of latents. Pieces of work that are compared
alternate; a ratio is the median over the rounds. "per core" counts the processor time of this process, its threads
included; the server has the same cores. Memory can be watched, too: of one process and its workers while they stream.
A row without an aim is there to be known.
"""

import io
import json
import os
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import webdataset
from botocore.config import Config
from PIL import Image
from webdataset.gopen import gopen_schemes

from megadit.benchmarks.data_memory import PIXELS, growth_bytes, run_elsewhere, simulate_order
from megadit.benchmarks.findings import Cell, Table
from megadit.data import sa1b_like
from megadit.data.format.index import PLACE, Index
from megadit.data.format.manifest import FORMAT_VERSION, LATENT, MANIFEST_NAME, LatentFacts, Manifest, ShardFacts
from megadit.data.indexing.captions import CaptionTable, join
from megadit.data.indexing.dataset import index
from megadit.data.loading.chunks import ChunkReader
from megadit.data.loading.decode import decode_picture
from megadit.data.loading.fetch import FETCH_THREADS, Supply, largest_chunks
from megadit.data.loading.loader import Loader
from megadit.data.loading.schedule import Schedule
from megadit.data.storage import open_store
from megadit.data.storage.local_s3 import LocalS3
from megadit.recipe import Data

BUCKET, SAMPLES_PER_TAR, SHORT_SIDE = "bench", 48, 1500
PICTURE_PASSES, LATENT_PASSES, INDEX_PASSES = 20, 10, 4  # over the data, in one piece of work
CHUNKS_AHEAD = FETCH_THREADS
MEMORY_MB = 400
LATENT_SHARDS, LATENTS_PER_SHARD, LATENT_SHAPE = 4, 4096, (4, 32, 32)
ORDER_MB = 1000
NUM_CAPTIONS, CAPTION_TARS, CAPTION_BYTES = 32_000, 64, 660


@dataclass(frozen=True)
class Row:
    """One line of the table: what ours does, beside a baseline or an aim of its own."""

    what: str
    ours: str
    baseline: str
    ratio: float
    aim: float | None = None

    def cells(self) -> dict[str, Cell]:
        verdict = "" if self.aim is None else "reached" if self.ratio >= self.aim else "missed"
        return {
            "what, beside": self.what,
            "ours": self.ours,
            "beside": self.baseline,
            "ratio": self.ratio,
            "aim": "" if self.aim is None else f"{self.aim:g}",
            "": verdict,
        }


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
    ours = _supply_work(data, PICTURE_PASSES)
    urls = [f"{url}/{shard.name}" for shard in manifest.shards] * PICTURE_PASSES
    num_samples, num_bytes = PICTURE_PASSES * manifest.num_samples, PICTURE_PASSES * _tar_bytes(manifest)

    def whole_shards() -> int:
        assert get_all(urls) == num_bytes
        return num_samples

    def webdataset_samples() -> int:
        found = sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))
        assert found == num_samples
        return found

    rows = []
    for what, theirs, aim in (("whole shards by GET", whole_shards, 0.9), ("webdataset", webdataset_samples, 1.3)):
        one, other, ratio = alternate(ours, theirs, time.perf_counter, rounds)
        rows.append(Row(f"undecoded samples/s, {what}", f"{one:.0f}", f"{other:.0f}", ratio, aim))
    return rows


def _supply_work(data: Data, passes: int) -> Callable[[], int]:
    """Some epochs' samples out of a supply that begins anew and reads ahead as little as keeps it busy."""
    reader = ChunkReader(data.url, data.client)
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


def _tar_bytes(manifest: Manifest) -> int:
    return sum(shard.num_bytes for shard in manifest.shards)


def get_all(urls: Sequence[str]) -> int:
    """GETs of whole objects by boto3 alone, as many at a time as ours has of ranges; nothing is checked. Bytes."""
    client = boto3.client("s3", config=Config(max_pool_connections=FETCH_THREADS))

    def get(url: str) -> int:
        return len(_body(client, url).read())

    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        return sum(pool.map(get, urls))


def open_s3(url: str, mode: str = "rb", bufsize: int = 8192, **options: Any) -> Any:
    """What webdataset opens a shard with: the body of one GET by boto3."""
    return _body(boto3.client("s3"), url)


def _body(client: Any, url: str) -> Any:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return client.get_object(Bucket=bucket, Key=key)["Body"]


# Tars and captions that are indexed


def index_rows(url: str, folder: Path, rounds: int) -> list[Row]:
    """MB a second of tars that are indexed where they lie, beside GETs of the same tars, by the clock and per core."""
    numbers, rows = count(), []
    store = open_store(url)
    tars = {f"{url}/{name}": store.size(name) or 0 for name in store.list() if name.endswith(".tar")}

    def ours() -> int:
        for _ in range(INDEX_PASSES):
            index(url, str(folder / str(next(numbers))), workers=FETCH_THREADS)  # elsewhere, or it has nothing to do
        return INDEX_PASSES * sum(tars.values())

    def theirs() -> int:
        return get_all([*tars] * INDEX_PASSES)

    for what, clock in (("s", time.perf_counter), ("s per core", time.process_time)):
        one, other, ratio = alternate(ours, theirs, clock, rounds)
        rows.append(
            Row(f"MB/{what} of tars indexed, whole shards by GET", f"{one / 1e6:.0f}", f"{other / 1e6:.0f}", ratio)
        )
    return rows


def caption_row(folder: Path, rounds: int) -> Row:
    """Lines a second of captions in any order that are joined by key, beside reading the lines as JSON."""
    names = [f"sa_{number}" for number in range(NUM_CAPTIONS)]
    keys = np.array(names, dtype=np.bytes_)
    order, counts = np.argsort(keys), np.full(CAPTION_TARS, NUM_CAPTIONS // CAPTION_TARS)
    store, table = open_store(str(folder)), folder / "captions.jsonl"
    shuffled = np.random.default_rng(0).permutation(names).tolist()
    lines = [json.dumps({"key": name, "caption": name.ljust(CAPTION_BYTES, ".")}) + "\n" for name in shuffled]
    store.put(table.name, "".join(lines).encode())

    def ours() -> int:
        files = [f"{number}.txt" for number in range(CAPTION_TARS)]
        joined = join(CaptionTable(str(table)), keys, order, counts, files, store)
        assert joined.found.all()
        return NUM_CAPTIONS

    def theirs() -> int:
        with table.open("rb") as file:
            return sum(1 for line in file if json.loads(line)["caption"])

    one, other, ratio = alternate(ours, theirs, time.process_time, rounds)
    return Row("captions joined per core, lines read as JSON", f"{one:.0f}/s", f"{other:.0f}/s", ratio)


# Decoding


def decode_rows(index_url: str, rounds: int) -> list[Row]:
    """Pictures of 1500 pixels brought to 256, beside decoding them whole; and the least of it, libjpeg's part."""
    reader = ChunkReader(index_url)
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

    def libjpeg() -> int:
        for data in pictures:
            picture = Image.open(io.BytesIO(data))
            picture.draft("RGB", (PIXELS, PIXELS))
            picture.load()
        return len(pictures)

    rows = []
    for what, work, aim in ((f"decoded to {PIXELS} px", ours, 4.0), ("libjpeg's part of it alone", libjpeg, None)):
        one, other, ratio = alternate(work, naive, time.process_time, rounds)
        rows.append(Row(f"{what}, per core, whole decode", f"{one:.0f}/s", f"{other:.0f}/s", ratio, aim))
    return rows


# Latents


def write_latents(folder: Path) -> None:
    """Shards of random latents of 8 KB, as `megadit data pack` writes them."""
    draws, keys = np.random.default_rng(0), list[str]()
    places, shards = list[tuple[int, int, int]](), list[ShardFacts]()
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
        shards.append(ShardFacts(name=name, num_samples=LATENTS_PER_SHARD, num_bytes=len(data), bucket="256x256"))
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
    ours = _supply_work(Data(url=str(folder), num_streams=1, chunk_samples=1024, chunks_per_group=2), LATENT_PASSES)
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]

    def theirs() -> int:
        return sum(1 for _ in webdataset.WebDataset(paths * LATENT_PASSES, shardshuffle=False))

    one, other, ratio = alternate(ours, theirs, time.process_time, rounds)
    return Row("8 KB latents per core, webdataset", f"{one:.0f}/s", f"{other:.0f}/s", ratio, 3.0)


# Start and order


def resume_row(index_url: str) -> Row:
    """Seconds from nothing to the first decoded batch of a step in the middle of a group."""
    data = Data(url=index_url, num_streams=1, chunk_samples=16, chunks_per_group=2, resolution=PIXELS)
    start = time.perf_counter()
    batches = Loader(data, 0, 8, 0, 1).iterate(1001)
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return Row("seconds to the first batch after a resume", f"{seconds:.2f}", "2", 2 / seconds, 1.0)


def order_rows() -> list[Row]:
    """The order of 11 million samples of eight resolutions, for one of 1024 ranks and for all of them."""
    one_rank, all_ranks, peak_bytes = run_elsewhere(simulate_order)
    rows = []
    for what, milliseconds in (("one rank's", one_rank), ("the global", all_ranks)):
        rows.append(
            Row(
                f"ms for {what} order of any step, median (largest {max(milliseconds):.0f}, cold ones included)",
                f"{statistics.median(milliseconds):.1f}",
                "50",
                50 / statistics.median(milliseconds),
                1.0,
            )
        )
    peak = Row(
        "MB of a process that does so, its peak",
        f"{peak_bytes / 1e6:.0f}",
        f"{ORDER_MB}",
        ORDER_MB * 1e6 / peak_bytes,
        1.0,
    )
    return [*rows, peak]


def memory_row(index_url: str, minutes: float, workers: int) -> Row:
    """What a new process and its workers grow by while they stream, beside data.memory_mb."""
    most = run_elsewhere(growth_bytes, index_url, 60 * minutes, MEMORY_MB, workers)
    what = f"MB in {minutes:g} minutes, {workers} workers, data.memory_mb"
    return Row(what, f"{most / 1e6:.0f}", f"{MEMORY_MB}", MEMORY_MB * 1e6 / most, 1 / 1.2)


def bench_data(samples: int, rounds: int, minutes: float, workers: int) -> Table:
    """`samples` pictures of 1500 pixels, 0.8 MB each; memory is watched for `minutes`, with `workers` processes."""
    with tempfile.TemporaryDirectory(prefix="megadit-bench-") as folder:
        rows = [row.cells() for row in measure(Path(folder), samples, rounds, minutes, workers)]
    return Table(f"the data plane, {samples} pictures", "what the row says after the comma; more is better", rows)


def measure(folder: Path, samples: int, rounds: int, minutes: float, workers: int) -> Iterator[Row]:
    """All rows; files are written below `folder`."""
    with LocalS3(folder / "s3") as server:
        os.environ |= server.environment
        boto3.setup_default_session()  # with these credentials, whoever had others before
        server.create_bucket(BUCKET)
        url, index_url = f"s3://{BUCKET}/tars", f"s3://{BUCKET}/index"
        sa1b_like.make(url, samples, samples_per_tar=SAMPLES_PER_TAR, short_side=SHORT_SIDE, num_masks=100)
        index(url, index_url)
        gopen_schemes["s3"] = open_s3
        yield from raw_rows(url, index_url, rounds)
        yield from index_rows(url, folder / "indexes", rounds)
        yield caption_row(folder / "captions", rounds)
        yield from decode_rows(index_url, rounds)
        write_latents(folder / "latents")
        yield latent_row(folder / "latents", rounds)
        yield resume_row(index_url)
        yield from order_rows()
        if minutes:
            yield memory_row(index_url, minutes, workers)
