from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings as effort, strategies as st

from megadit.data.format.index import Index
from megadit.data.format.manifest import FORMAT_VERSION, ImageFacts, Manifest, ShardFacts
from megadit.data.loading.order import Order
from megadit.data.loading.schedule import Schedule
from megadit.recipe import Data


def packed_manifest(shards: list[tuple[str, int]]) -> Manifest:
    return Manifest(
        version=FORMAT_VERSION,
        name="",
        inputs="",
        num_samples=sum(count for _, count in shards),
        members=("png",),
        image=ImageFacts(),
        shards=tuple(
            ShardFacts(name=str(number), num_samples=count, num_bytes=0, bucket=bucket)
            for number, (bucket, count) in enumerate(shards)
        ),
        index={},
    )


def make(
    shards: list[tuple[str, int]], seed: int = 0, batch_size: int = 8, K: int = 2, C: int = 2, G: int = 2
) -> Schedule:
    data = Data(url="", num_streams=K, chunk_samples=C, chunks_per_group=G)
    return Schedule(packed_manifest(shards), Index(np.array([]), {}), data, seed, batch_size)


schedules = st.builds(
    make,
    shards=st.lists(
        st.tuples(st.sampled_from(["16x16", "16x32", "32x16"]), st.integers(8, 60)), min_size=1, max_size=6
    ),
    seed=st.integers(0, 2**63 - 1),
    batch_size=st.sampled_from([2, 6, 8]),
)


@effort(deadline=None)
@given(schedules, st.integers(0, 200))
def test_steps_of_a_bucket_are_counted(schedule: Schedule, last: int) -> None:
    seen = Counter[int]()
    for step in range(last):
        bucket, number = schedule.locate(step)
        assert number == seen[bucket]
        seen[bucket] += 1


@effort(deadline=None)
@given(schedules)
def test_a_cycle_takes_an_epoch_of_every_bucket(schedule: Schedule) -> None:
    steps = [max(1, bucket.order.epoch_samples // schedule.batch_size) for bucket in schedule.buckets]
    for cycle in range(2):
        taken = Counter(schedule.locate(cycle * sum(steps) + place)[0] for place in range(sum(steps)))
        assert [taken[number] for number in range(len(steps))] == steps


@effort(deadline=None)
@given(schedules)
def test_each_sample_at_most_once_in_an_epoch_of_its_bucket(schedule: Schedule) -> None:
    """And exactly once but for what the order of its bucket leaves out: less than a round and a chunk."""
    pairs = Counter[tuple[int, int]]()
    resolution: dict[int, int] = {}
    steps = max(1, 2 * sum(bucket.order.epoch_samples for bucket in schedule.buckets) // schedule.batch_size)
    for step in range(2 * steps):
        bucket, _ = schedule.locate(step)
        for epoch, sample in schedule.step(step).tolist():
            pairs[epoch, sample] += 1
            assert resolution.setdefault(sample, bucket) == bucket  # a batch has one resolution
    assert set(pairs.values()) == {1}
    for number, bucket in enumerate(schedule.buckets):
        first_epoch = [sample for epoch, sample in pairs if epoch == 0 and resolution[sample] == number]
        assert len(first_epoch) == bucket.order.epoch_samples
        assert bucket.order.num_samples - len(first_epoch) < 8 + 2  # K*G*C + C


def test_one_resolution_is_the_order_itself() -> None:
    schedule = make([("16x16", 40), ("16x16", 33)], seed=5)
    order = Order(73, 5, 2, 2, 2)
    for step in (0, 7, 40):
        np.testing.assert_array_equal(schedule.step(step), order.step(step, 8))


def test_the_schedule_is_what_it_was() -> None:
    """Changing these numbers breaks the continuation of every run there is."""
    schedule = make([("16x16", 40), ("16x32", 24), ("16x16", 9)], seed=7)
    assert [schedule.locate(step) for step in range(9)] == [
        (1, 0),
        (0, 0),
        (0, 1),
        (1, 1),
        (0, 2),
        (0, 3),
        (0, 4),
        (1, 2),
        (0, 5),
    ]
    assert schedule.step(3)[:, 1].tolist() == [52, 58, 57, 51, 42, 41, 56, 55]


def test_small_buckets_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        schedule = make([("16x16", 40), ("16x32", 7), ("32x16", 5)])
    assert schedule.left_out == {"16x32": 7, "32x16": 5}
    assert [bucket.height for bucket in schedule.buckets] == [16]
    assert "12 samples of 2 resolutions are left out, fewer than 8 of each: 16x32 (7), 32x16 (5)" in caplog.text
    with pytest.raises(ValueError, match=r"7 samples are too few for data.num_streams 2"):
        make([("16x16", 6), ("16x32", 7)])


def test_the_recipe_must_fit_the_data(raw: Path) -> None:
    manifest = packed_manifest([("16x16", 40)])
    with pytest.raises(ValueError, match=r"data.resolution is for pictures as they were found; .* packed at 16x16"):
        Schedule(manifest, Index(np.array([]), {}), Data(url="", resolution=16), 0, 8)
    found = Manifest.load(str(raw))
    with pytest.raises(ValueError, match=r"sizes of their own: data.resolution must say"):
        Schedule(found, Index(np.array([]), {}), Data(url=""), 0, 8)


def test_pictures_as_they_were_found_go_to_the_nearest_aspect_ratio() -> None:
    sizes = np.array([(1500, 2250), (2250, 1500), (1500, 1500)] * 20, dtype=np.uint16)
    manifest = SimpleNamespace(buckets=tuple, num_samples=60)
    data = Data(url="", num_streams=2, chunk_samples=2, chunks_per_group=2, resolution=256, aspect_buckets=True)
    schedule = Schedule(manifest, Index(np.array([]), {}, sizes), data, 0, 4)  # type: ignore[arg-type]
    ratios = sorted(round(bucket.width / bucket.height, 2) for bucket in schedule.buckets)
    assert ratios == pytest.approx([1 / 1.5, 1, 1.5], rel=0.1)
    for step in range(20):
        bucket = schedule.buckets[schedule.locate(step)[0]]
        seen = sizes[schedule.step(step)[:, 1]]
        assert len(np.unique(seen, axis=0)) == 1
        assert (seen[0][1] > seen[0][0]) == (bucket.width > bucket.height)
    square = Schedule(manifest, Index(np.array([]), {}), data.model_copy(update={"aspect_buckets": False}), 0, 4)
    assert [(bucket.height, bucket.width, bucket.samples) for bucket in square.buckets] == [(256, 256, None)]


def test_every_rank_has_an_equal_share_and_chunks_of_its_own() -> None:
    """11 million samples, 1024 ranks: two steps, and for some groups of all streams who reads which chunk."""
    schedule = make([(f"{16 * n}x16", 2_750_000) for n in (1, 2, 3, 4)], batch_size=4096, K=1024, C=16, G=4)
    for step in (0, 123_456):
        pairs = schedule.step(step).reshape(1024, 4, 2)
        assert len(np.unique(pairs[:, :, 1])) == 4096
    order = schedule.buckets[2].order
    readers: dict[int, int] = {}
    for stream in range(0, 1024, 8):
        for group in (0, 7):
            epoch, chunks_GC, _ = order.group_chunks(stream, group)
            assert epoch == 0
            for first in chunks_GC[:, 0].tolist():
                assert readers.setdefault(first, stream) == stream
    assert len(readers) == 128 * 2 * 4
