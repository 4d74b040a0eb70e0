"""The stream of data sets of several resolutions, of latents, and of pictures as they were found."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings as effort, strategies as st
from PIL import Image

from megadit.batch import TENSORS, Batch, concatenate
from megadit.data.format.manifest import Manifest
from megadit.data.loading.chunks import ChunkReader
from megadit.data.loading.decode import decode_array, decode_picture
from megadit.data.loading.loader import Loader, validation_batches
from megadit.data.loading.schedule import Schedule
from megadit.randomness import Purpose, generator
from megadit.recipe import Data

SEED, BATCH = 3, 8
STEPS = 60  # more than an epoch of each bucket


def settings(url: Path, **changes: object) -> Data:
    return Data(**({"url": str(url), "num_streams": 8, "chunk_samples": 2, "chunks_per_group": 2} | changes))


def steps(data: Data, ranks: int = 1, first: int = 0, count: int = STEPS) -> list[Batch]:
    streams = [Loader(data, SEED, BATCH, rank, ranks).iterate(first) for rank in range(ranks)]
    batches = [concatenate([next(stream) for stream in streams]) for _ in range(count)]
    for stream in streams:
        stream.close()
    return batches


def digests(batches: list[Batch]) -> list[str]:
    return [
        hashlib.sha256(
            b"".join(getattr(batch, name).numpy().tobytes() for name in TENSORS) + repr(batch.captions).encode()
        ).hexdigest()
        for batch in batches
    ]


@pytest.fixture(scope="module")
def expected(bucketed: Path) -> list[Batch]:
    return steps(settings(bucketed))


@pytest.fixture(scope="module")
def expected_digests(expected: list[Batch]) -> list[str]:
    return digests(expected)


def test_the_samples_are_those_of_the_schedule(bucketed: Path, expected: list[Batch]) -> None:
    reader = ChunkReader(str(bucketed))
    schedule = Schedule(reader.manifest, reader.index, settings(bucketed), SEED, BATCH)
    assert schedule.left_out == {"32x32": 7}
    shapes = set()
    for number, batch in enumerate(expected):
        pairs = torch.stack([batch.epoch, batch.sample], dim=1).numpy()
        np.testing.assert_array_equal(pairs, schedule.step(number))
        bucket = schedule.buckets[schedule.locate(number)[0]]
        assert batch.images.shape == batch.noise.shape == (BATCH, 4, bucket.height // 8, bucket.width // 8)
        shapes.add(tuple(batch.images.shape))
    assert len(shapes) == 3
    assert max(int(batch.epoch.max()) for batch in expected) >= 2


@effort(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, STEPS - 9), ranks=st.sampled_from([1, 2, 4, 8]))
def test_any_number_of_ranks_from_any_step(bucketed: Path, expected_digests: list[str], first: int, ranks: int) -> None:
    assert digests(steps(settings(bucketed), ranks, first, 9)) == expected_digests[first : first + 9]


@pytest.mark.parametrize(("ranks", "workers", "first"), [(1, 3, 0), (2, 1, 25)])
def test_any_number_of_workers(
    bucketed: Path, expected_digests: list[str], ranks: int, workers: int, first: int
) -> None:
    found = steps(settings(bucketed, num_workers=workers), ranks, first, STEPS - first)
    assert digests(found) == expected_digests[first:]


def test_latents_are_drawn_from_mean_and_std(bucketed: Path, expected: list[Batch]) -> None:
    reader = ChunkReader(str(bucketed))
    batch = expected[5]
    stored = reader.read(batch.sample.numpy())
    for place, sample in enumerate(batch.sample.tolist()):
        mean, std = np.load(io.BytesIO(stored[sample]["latent.npy"])).astype(np.float32)
        draws = generator(SEED, Purpose.TRAINING_SAMPLE, int(batch.epoch[place]), sample)
        uniforms = draws.random(2, dtype=np.float32)
        noise = draws.standard_normal(mean.shape, dtype=np.float32)
        draw = draws.standard_normal(mean.shape, dtype=np.float32)
        assert batch.drop_uniform[place] == uniforms[1]
        np.testing.assert_array_equal(batch.noise[place], noise)
        np.testing.assert_allclose(batch.images[place], (mean + std * draw - 0.25) * 0.5, rtol=1e-6, atol=1e-6)
        assert batch.captions[place] == bytes(stored[sample]["txt"]).decode()
    assert batch.text.shape == (BATCH, 0, 0) and batch.pooled.shape == (BATCH, 0)
    halves = batch.split(4)
    assert [half.captions for half in halves] == [batch.captions[:4], batch.captions[4:]]
    assert digests([concatenate(halves)]) == digests([batch])


def test_pictures_as_they_were_found(raw: Path) -> None:
    data = settings(raw, num_streams=4, resolution=64, aspect_buckets=True)
    manifest = Manifest.load(str(raw))
    places = ChunkReader(str(raw)).index.places["jpg"]
    shards = [(raw / shard.name).read_bytes() for shard in manifest.shards]
    shapes = set()
    batches = steps(data, 2, count=20)
    for batch in batches:
        height, width = batch.images.shape[2:]
        shapes.add((height, width))
        for image, sample in zip(batch.images, batch.sample.tolist(), strict=True):
            offset, size, _ = places[sample].tolist()
            picture = Image.open(io.BytesIO(shards[sample >= 70][offset : offset + size]))
            pixels = decode_picture(shards[sample >= 70][offset : offset + size], height, width)
            np.testing.assert_allclose(image.permute(1, 2, 0), pixels / 127.5 - 1, atol=1e-6)
            assert (picture.width > picture.height) == (width > height)
    assert len(shapes) == 3
    assert digests(steps(data, 4, first=7, count=5)) == digests(batches[7:12])
    square = steps(settings(raw, num_streams=4, resolution=24), count=2)
    assert square[0].images.shape == (BATCH, 3, 24, 24)


def test_only_what_is_needed_is_read(raw: Path) -> None:
    reader = ChunkReader(str(raw))
    assert reader.decoder.kinds == ("jpg",)
    ranges = reader.ranges(np.arange(66, 74))  # across the end of the first shard
    assert [(part.file.name, len(part.members)) for part in ranges] == [("shard-0.tar", 4), ("shard-1.tar", 4)]
    assert all(part.file.etag == shard.etag for part, shard in zip(ranges, reader.manifest.shards, strict=True))


@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_of_several_resolutions_covers_every_pair_once(bucketed: Path, ranks: int) -> None:
    data = settings(Path("/nowhere"), validation_url=str(bucketed))
    found: dict[tuple[int, float], int] = {}
    counts = set()
    for rank in range(ranks):
        batches = list(validation_batches(data, SEED, rank, ranks, 16, 3))
        counts.add(len(batches))
        for batch, weights in batches:
            assert len(batch) == 16
            for sample, uniform, weight in zip(batch.sample.tolist(), batch.timestep_uniform, weights, strict=True):
                if weight:
                    pair = (sample, float(uniform))
                    found[pair] = found.get(pair, 0) + 1
    assert len(counts) == 1
    assert set(found.values()) == {1}
    assert len(found) == 3 * Manifest.load(str(bucketed)).num_samples


def test_too_little_memory(raw: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.memory_mb 1 is too little: the open groups of 4 streams .*; lower data"
    ):
        Loader(settings(raw, num_streams=4, resolution=96, memory_mb=1), SEED, BATCH, 0, 1)


def test_arrays_are_what_numpy_reads() -> None:
    for values in (np.arange(6, dtype=np.float16).reshape(1, 2, 3), np.zeros((0, 4), np.int8), np.float16(3)):
        buffer = io.BytesIO()
        np.save(buffer, values)
        np.testing.assert_array_equal(decode_array(memoryview(buffer.getvalue())), values)
