"""What is read, and how much is held, on hand-made data sets with members in any places."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings as effort, strategies as st

from megadit.data.format.index import PLACE, Index
from megadit.data.loading.chunks import GAP_BYTES, ChunkReader
from megadit.data.loading.fetch import Supply, largest_chunks
from megadit.data.loading.schedule import Bucket, Schedule
from megadit.recipe import Data

sizes = st.sampled_from([1, 100, GAP_BYTES // 2, GAP_BYTES, GAP_BYTES + 1])


@effort(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(sizes, sizes, sizes, sizes), min_size=12, max_size=40), mixed=st.booleans())
def test_the_largest_chunk_is_never_less_than_what_is_read(
    bucketed: Path, rows: list[tuple[int, int, int, int]], mixed: bool
) -> None:
    """Members one after the other or apart, other files of any size between them."""
    reader, places = ChunkReader(str(bucketed)), {kind: np.zeros(len(rows), PLACE) for kind in ("latent.npy", "txt")}
    order = [(kind, row) for row in range(len(rows)) for kind in places]
    if mixed:
        order.sort(key=lambda item: (item[0], item[1]))
    offset = 0
    for kind, row in order:
        size, gap = rows[row][:2] if kind == "txt" else rows[row][2:]
        places[kind][row] = (offset, size, 0)
        offset += size + gap
    count = len(rows)
    shard = reader.manifest.shards[0].model_copy(update={"num_samples": count, "bucket": "16x16"})
    reader.manifest = reader.manifest.model_copy(update={"shards": (shard,), "num_samples": count})
    reader.index, reader._ends = Index(np.array([b""] * count), places), np.array([count])
    data = Data(url="", num_streams=1, chunk_samples=3, chunks_per_group=2)
    schedule = Schedule(reader.manifest, reader.index, data, 0, 1)
    (largest,) = largest_chunks(reader, schedule)
    for first in range(count):
        ranges = reader.ranges((first + np.arange(3)) % count)
        assert sum(part.end - part.start for part in ranges) <= largest
        assert all(part.end > part.start for part in ranges)


def test_no_more_is_held_than_the_limit(bucketed: Path) -> None:
    """With room for one group of each stream and bucket, and not a byte more, the stream goes on."""
    reader = ChunkReader(str(bucketed))
    data = Data(url=str(bucketed), num_streams=4, chunk_samples=2, chunks_per_group=3)
    schedule = Schedule(reader.manifest, reader.index, data, 0, 8)
    limit = sum(
        max(group_bytes(reader, bucket, stream, number) for number in range(24))
        for bucket in schedule.buckets
        for stream in range(4)
    )
    supply, most = Supply(reader, schedule, range(4), 5, limit), 0
    for step in range(5, 60):
        items = list(supply.step())
        assert [(item.epoch, item.sample) for item in items] == [tuple(pair) for pair in schedule.step(step).tolist()]
        assert 0 <= supply.held_bytes <= limit
        most = max(most, supply.held_bytes)
    assert most > limit / 4
    supply.close()


def group_bytes(reader: ChunkReader, bucket: Bucket, stream: int, number: int) -> int:
    _, chunks_GC, _ = bucket.order.group_chunks(stream, number)
    return sum(part.end - part.start for row in chunks_GC for part in reader.ranges(bucket.manifest_places(row)))


def test_only_so_much_is_read_ahead(bucketed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much memory there is; and each chunk is read once."""
    reader = ChunkReader(str(bucketed))
    data = Data(url=str(bucketed), num_streams=4, chunk_samples=2, chunks_per_group=8)
    schedule = Schedule(reader.manifest, reader.index, data, 0, 8)
    asked: list[tuple[int, ...]] = []
    read_chunk = reader.read_chunk

    def recorded(samples: np.ndarray, ranges: list) -> object:
        asked.append(tuple(samples.tolist()))
        return read_chunk(samples, ranges)

    monkeypatch.setattr(reader, "read_chunk", recorded)
    supply = Supply(reader, schedule, range(4), 0, 1 << 40)
    needed = {tuple(item.chunk.samples) for _ in range(3) for item in supply.step()}
    supply.close()
    assert needed <= set(asked)
    assert len(asked) <= (2 * 4 + 1 + 2 * 4) * 8  # begun in two buckets, and ahead of need
    assert len(asked) == len(set(asked))
