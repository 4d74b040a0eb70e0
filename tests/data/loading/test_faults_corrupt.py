"""Samples that are corrupt at rest: what takes their place, who is told, and when a run stops."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megadit.batch import Batch, concatenate
from megadit.data.format.manifest import Manifest
from megadit.data.format.members import CorruptShardError
from megadit.data.loading.chunks import ChunkReader
from megadit.data.loading.loader import Loader, validation_batches
from megadit.data.loading.order import Order
from megadit.recipe import Data

SEED, BATCH, K, C, G = 5, 8, 4, 4, 2
STEPS = 20
BROKEN = (3, 7, 8, 9, 50)


def settings(url: Path, **changes: object) -> Data:
    streams = {"num_streams": K, "chunk_samples": C, "chunks_per_group": G, "resolution": 16, "max_corrupt_share": 0.5}
    return Data(**({"url": str(url)} | streams | changes))


def spoil(url: Path, samples: tuple[int, ...]) -> None:
    """Change one byte in the middle of each picture; the ETag of the index is that of the spoilt files."""
    manifest = Manifest.load(str(url))
    places = ChunkReader(str(url)).index.places["jpg"]
    shards = []
    for number, shard in enumerate(manifest.shards):
        data = bytearray((url / shard.name).read_bytes())
        for sample in samples:
            if (sample >= manifest.shards[0].num_samples) == bool(number):
                data[int(places["offset"][sample]) + int(places["size"][sample]) // 2] ^= 1
        (url / shard.name).write_bytes(data)
        shards.append(shard.model_copy(update={"etag": None}))
    (url / "manifest.json").write_bytes(manifest.model_copy(update={"shards": tuple(shards)}).sealed().dump())


@pytest.fixture
def broken(raw: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(raw, tmp_path / "copy"))
    spoil(copy, BROKEN)
    return copy


def steps(data: Data, ranks: int = 1, first: int = 0, count: int = STEPS) -> list[Batch]:
    streams = [Loader(data, SEED, BATCH, rank, ranks).iterate(first) for rank in range(ranks)]
    try:
        return [concatenate([next(stream) for stream in streams]) for _ in range(count)]
    finally:
        for stream in streams:
            stream.close()


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.noise, b.noise) and torch.equal(a.replaced, b.replaced)
        for a, b in zip(one, other, strict=True)
    )


def test_the_next_sound_sample_of_the_chunk_takes_its_place(raw: Path, broken: Path) -> None:
    clean, found = steps(settings(raw)), steps(settings(broken))
    order = Order(120, SEED, K, C, G)
    chunks = {}  # (epoch, sample) -> its chunk
    for stream in range(K):
        for number in range(8):
            epoch, chunks_GC, _ = order.group_chunks(stream, number)
            chunks |= {(epoch, sample): chunk for chunk in chunks_GC.tolist() for sample in chunk}
    pictures = {
        sample: image for batch in clean for sample, image in zip(batch.sample.tolist(), batch.images, strict=True)
    }
    replaced = 0
    for batch, good in zip(found, clean, strict=True):
        for name in ("epoch", "sample", "noise", "timestep_uniform", "drop_uniform"):
            assert torch.equal(getattr(batch, name), getattr(good, name))  # the draws stay
        for place, (epoch, sample) in enumerate(zip(batch.epoch.tolist(), batch.sample.tolist(), strict=True)):
            assert bool(batch.replaced[place]) == (sample in BROKEN)
            chunk, source = chunks[epoch, sample], sample
            while source in BROKEN:
                source = chunk[(chunk.index(source) + 1) % C]
            assert torch.equal(batch.images[place], pictures[source])
            replaced += sample in BROKEN
    assert replaced > 3


@pytest.mark.parametrize(("ranks", "workers", "first"), [(2, 0, 0), (4, 0, 11), (1, 2, 5)])
def test_it_is_the_same_on_any_number_of_ranks_and_workers(broken: Path, ranks: int, workers: int, first: int) -> None:
    expected = steps(settings(broken))[first:]
    assert same(steps(settings(broken, num_workers=workers), ranks, first, STEPS - first), expected)


def test_it_is_told(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps(settings(broken, num_workers=2))
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("corrupt sample")]
    keys = [f"k{sample:06d}" for sample in BROKEN]
    assert {key for key in keys if any(f"member {key}.jpg: CRC-32 differs, twice" in line for line in told)} == set(
        keys
    )
    assert all(line.endswith(" is in its place") for line in told)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_stop_the_run_with_their_names(broken: Path, workers: int) -> None:
    with pytest.raises(CorruptShardError) as caught:
        steps(settings(broken, max_corrupt_share=0.02, num_workers=workers))
    assert "corrupt samples are more than data.max_corrupt_share 0.02 of 96: file://" in str(caught.value)
    assert "member k0000" in str(caught.value)
    assert len(steps(settings(broken, max_corrupt_share=0.1))) == STEPS


def test_a_picture_that_does_not_decode_is_replaced(raw: Path, tmp_path: Path, caplog) -> None:
    """Its CRC-32 is right: it was so when it was indexed."""
    copy = Path(shutil.copytree(raw, tmp_path / "copy"))
    index = ChunkReader(str(raw)).index
    places = index.places["jpg"].copy()
    places["size"][6] = 40  # the index of a picture cut short
    import zlib

    offset = int(places["offset"][6])
    places["crc32"][6] = zlib.crc32((raw / "shard-0.tar").read_bytes()[offset : offset + 40])
    rewrite_index(copy, places)
    batches = steps(settings(copy))
    assert sum(int(batch.replaced.sum()) for batch in batches) >= 1
    assert "k000006: not a picture that Pillow decodes" in caplog.text


def rewrite_index(url: Path, places: np.ndarray) -> None:
    from megadit.data.format.index import Index
    from megadit.data.storage import open_store

    old = ChunkReader(str(url)).index
    columns = Index(old.keys, {**old.places, "jpg": places}, old.sizes).write(open_store(str(url)))
    manifest = Manifest.load(str(url))
    shards = tuple(shard.model_copy(update={"etag": None}) for shard in manifest.shards)
    (url / "manifest.json").write_bytes(
        manifest.model_copy(update={"index": columns, "shards": shards}).sealed().dump()
    )


def test_a_chunk_without_a_sound_sample_stops_the_run(raw: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(raw, tmp_path / "copy"))
    spoil(copy, tuple(range(60)))
    with pytest.raises(CorruptShardError, match=r"CRC-32 differs, twice.*none of the 4 samples that were read with it"):
        steps(settings(copy, max_corrupt_share=0.9))


def test_a_corrupt_validation_set_is_an_error(broken: Path) -> None:
    data = settings(Path("/nowhere"), validation_url=str(broken))
    with pytest.raises(CorruptShardError, match=r"member k000003.jpg: CRC-32 differs, twice"):
        list(validation_batches(data, SEED, 0, 1, 16, 1))


def test_an_index_older_than_its_tar(raw: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(raw, tmp_path / "copy"))
    (copy / "shard-0.tar").write_bytes((raw / "shard-1.tar").read_bytes())
    with pytest.raises(
        ValueError, match=r"the index is older than the tar: .*shard-0.tar was changed .*; index it again"
    ):
        steps(settings(copy))
