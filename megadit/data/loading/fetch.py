"""Chunks on their way from the shards to the samples: read ahead in the order of need, within a number of bytes.

One thread, the consumer's, decides and counts; the threads of a pool only read. What is read ahead is started strictly
in the order of need, and waits where the next chunk does not fit. So whatever is held is needed before whatever is not:
where a group of every stream and bucket fits, nothing can lock up. However much would fit, about one group of each
stream is read ahead: more helps nobody, and would be read for nothing when a run ends.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np

from megadit.data.format.members import Range
from megadit.data.loading.chunks import GAP_BYTES, Chunk, ChunkReader
from megadit.data.loading.schedule import Bucket, Schedule

FETCH_THREADS = 8  # Range GETs in flight in one process
LEAST_AHEAD = FETCH_THREADS  # chunks read ahead, however small the groups are
SPARE_SHARE = 8  # of the limit: memory that waits for the next chunk may exceed it by a part in so many
BLOCK_SAMPLES = 1 << 20  # of the index, looked at together


class Item(NamedTuple):
    """A sample of the order, undecoded: place `place` of `chunk`."""

    bucket: Bucket
    epoch: int
    sample: int
    chunk: Chunk
    place: int


@dataclass
class _Pending:
    """A chunk of a group, and how many of its samples are still to be taken."""

    samples: np.ndarray
    ranges: list[Range]
    num_bytes: int
    unread: int
    future: Future[Chunk] | None = None
    chunk: Chunk | None = None


@dataclass
class _Group:
    """The chunks of a stream's group, and its samples in order: place // C is the chunk."""

    epoch: int
    places: list[int]
    chunks: list[_Pending] = field(default_factory=list)
    taken: bool = False  # a sample of it


class Supply:
    """The undecoded samples of some streams, step after step, from `first_step` on.

    Never holds more than `limit_bytes` of what was read, what is on its way included (`held_bytes`). One at a time may
    have the reader. Close it to stop its threads. `step` raises StorageError when a chunk cannot be read.
    """

    def __init__(
        self, reader: ChunkReader, schedule: Schedule, streams: Sequence[int], first_step: int, limit_bytes: int
    ) -> None:
        self.held_bytes = 0
        chunks_per_group = schedule.buckets[0].order.chunks_per_group
        self._most_ahead = max(len(streams), -(-LEAST_AHEAD // chunks_per_group))
        self._num_ahead = 0  # groups that are planned, and of which nothing was taken
        self._reader, self._schedule, self._streams, self._limit = reader, schedule, streams, limit_bytes
        self._step = first_step
        self._groups: dict[tuple[int, int, int], _Group] = {}  # by bucket, stream, number
        self._plan = self._needed(first_step)
        self._next = next(self._plan)
        self._pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="megadit-fetch")

    def close(self) -> None:
        """Stop the threads and let go of what was read; requests that are under way end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._reader.pages.room_bytes = 0
        self._groups.clear()

    def step(self) -> Iterator[Item]:
        """The samples of the next global step, those of each stream in turn."""
        which, number = self._schedule.locate(self._step)
        self._step += 1
        bucket, share = self._schedule.buckets[which], self._schedule.share
        group_samples = bucket.order.group_samples
        for stream in self._streams:
            first, last = number * share, (number + 1) * share
            while first < last:
                group_number, begin = divmod(first, group_samples)
                end = min(group_samples, begin + last - first)
                yield from self._take(which, stream, group_number, range(begin, end))
                first += end - begin

    def _take(self, which: int, stream: int, number: int, places: range) -> Iterator[Item]:
        """Some samples of a group, those at `places` of its order."""
        bucket = self._schedule.buckets[which]
        self._read_ahead()
        group = self._groups[which, stream, number]
        if not group.taken:
            group.taken = True
            self._num_ahead -= 1
        for place in places:
            row, place_in_chunk = divmod(group.places[place], bucket.order.chunk_samples)
            pending = group.chunks[row]
            chunk = pending.chunk or self._arrived(pending)
            pending.unread -= 1
            if not pending.unread:
                pending.chunk = None
                self.held_bytes -= pending.num_bytes
                self._read_ahead()
            yield Item(bucket, group.epoch, chunk.samples[place_in_chunk], chunk, place_in_chunk)
        if places.stop == bucket.order.group_samples:
            del self._groups[which, stream, number]

    def _arrived(self, pending: _Pending) -> Chunk:
        if pending.future is None:
            self._read_ahead()
        assert pending.future is not None, "the groups of all streams fit into the limit"
        # Kept: a future is asked under a lock, which would cost each sample more than the rest of its way.
        pending.chunk, pending.future = pending.future.result(), None
        return pending.chunk

    def _read_ahead(self) -> None:
        while self._num_ahead <= self._most_ahead and self.held_bytes + self._next.num_bytes <= self._limit:
            pending, self._next = self._next, next(self._plan)
            self.held_bytes += pending.num_bytes
            pending.future = self._pool.submit(self._reader.read_chunk, pending.samples, pending.ranges)
        self._reader.pages.room_bytes = max(self._limit - self.held_bytes, self._limit // SPARE_SHARE)

    def _needed(self, first_step: int) -> Iterator[_Pending]:
        """All chunks in the order of need: that of `step`."""
        begun: dict[tuple[int, int], int] = {}  # bucket, stream -> groups
        share = self._schedule.share
        for step in count(first_step):
            which, number = self._schedule.locate(step)
            first, last = number * share, (number + 1) * share - 1
            group_samples = self._schedule.buckets[which].order.group_samples
            for stream in self._streams:
                for group in range(begun.get((which, stream), first // group_samples), last // group_samples + 1):
                    yield from self._begin(which, stream, group, max(0, first - group * group_samples))
                begun[which, stream] = last // group_samples + 1

    def _begin(self, which: int, stream: int, number: int, skip: int) -> Iterator[_Pending]:
        """The chunks of a group whose first `skip` samples are not taken."""
        bucket = self._schedule.buckets[which]
        order = bucket.order
        epoch, chunks_GC, places = order.group_chunks(stream, number)
        group = self._groups[which, stream, number] = _Group(epoch, places.tolist())
        self._num_ahead += 1
        unread_G = np.bincount(places[skip:] // order.chunk_samples, minlength=len(chunks_GC))
        for places_C, unread in zip(chunks_GC, unread_G.tolist(), strict=True):
            samples = bucket.manifest_places(places_C)
            ranges = self._reader.ranges(samples) if unread else []
            group.chunks.append(_Pending(samples, ranges, sum(part.end - part.start for part in ranges), unread))
        yield from (pending for pending in group.chunks if pending.unread)


def largest_chunks(reader: ChunkReader, schedule: Schedule) -> list[int]:
    """Of each bucket: the most bytes that are read for a chunk, wherever it starts."""
    return [_largest_chunk(reader, bucket) for bucket in schedule.buckets]


def _largest_chunk(reader: ChunkReader, bucket: Bucket) -> int:
    number, window = bucket.order.num_samples, bucket.order.chunk_samples
    largest, kept = 0, np.zeros(0, dtype=np.int64)
    for first in range(0, number, BLOCK_SAMPLES):
        sizes = reader.bytes_read(first, min(first + BLOCK_SAMPLES, number), bucket.samples)
        if not first:
            head = sizes[: window - 1]
        sizes = np.concatenate([kept, sizes])
        largest = max(largest, _largest_window(sizes, window))
        kept = sizes[len(sizes) - window + 1 :]
    # Chunks go on from the end to the start, and in one small file what lies between the two is read over.
    around = _largest_window(np.concatenate([kept, head]), window)
    return max(largest, around + GAP_BYTES * len(reader.decoder.kinds) if window > 1 else 0)


def _largest_window(sizes: np.ndarray, window: int) -> int:
    """The largest sum of `window` neighbours; 0 where there are not so many."""
    sums = np.concatenate([[0], np.cumsum(sizes)])
    return int((sums[window:] - sums[:-window]).max(initial=0))
