"""Which samples each global step takes where the data has several resolutions: an order for each, one schedule for all.

Every resolution bucket has its own order (see order.py) over its own samples, with its own epochs. A cycle has as many
steps of a bucket as its epoch fills, at least one; Philox(seed, cycle) permutes them. So the bucket of step n, and how
many steps it had before, are functions of (data set, seed, batch size, n).
"""

import logging
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megadit.data.format.buckets import assign, bucket_table
from megadit.data.format.index import Index
from megadit.data.format.manifest import Manifest, parse_bucket
from megadit.data.loading.order import Order
from megadit.randomness import Purpose, generator
from megadit.recipe import Data

log = logging.getLogger(__name__)

BLOCK_SAMPLES = 1 << 20  # sizes looked at together: an index of tens of millions is not copied into memory


@dataclass(frozen=True)
class Bucket:
    """The samples that are seen at one resolution.

    height, width: in pixels; samples: their places in the manifest, uint32, sorted, or None for all of them; order: of
    places in `samples`.
    """

    height: int
    width: int
    samples: np.ndarray | None
    order: Order

    def manifest_places(self, places: np.ndarray) -> np.ndarray:
        """Places in the order as places in the manifest, int64."""
        return places if self.samples is None else self.samples[places].astype(np.int64)


class Schedule:
    """The buckets, and which of them each step takes; a data set of one resolution has one.

    Resolutions with too few samples for an epoch of K*G*C are in `left_out`: height x width -> number of samples.
    Raises ValueError when none has enough, or when the recipe does not fit the data set.
    """

    def __init__(self, manifest: Manifest, index: Index, data: Data, seed: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.left_out: dict[str, int] = {}
        self._seed = seed
        buckets = []
        groups = samples_by_resolution(manifest, index, data)
        round_samples = data.num_streams * data.chunks_per_group * data.chunk_samples
        largest = max(_count(samples, manifest) for samples in groups.values())
        for (height, width), samples in groups.items():
            number = _count(samples, manifest)
            if number < round_samples and number < largest:
                self.left_out[f"{height}x{width}"] = number
                continue
            order = Order(number, seed, data.num_streams, data.chunk_samples, data.chunks_per_group)
            buckets.append(Bucket(height, width, samples, order))
        self.buckets = tuple(buckets)
        self.share = buckets[0].order.stream_share(batch_size)
        self._steps = [max(1, bucket.order.epoch_samples // batch_size) for bucket in buckets]
        self._cycle = lru_cache(maxsize=2)(self._compute_cycle)  # prefetching crosses into the next one
        if self.left_out:
            log.info(
                "%d samples of %d resolutions are left out, fewer than %d of each: %s",
                sum(self.left_out.values()),
                len(self.left_out),
                round_samples,
                ", ".join(f"{name} ({number})" for name, number in self.left_out.items()),
            )

    def locate(self, step: int) -> tuple[int, int]:
        """The number of the bucket of a global step, and how many steps of that bucket came before."""
        if len(self.buckets) == 1:
            return 0, step
        cycle, place = divmod(step, sum(self._steps))
        numbers, before = self._cycle(cycle)
        bucket = int(numbers[place])
        return bucket, cycle * self._steps[bucket] + int(before[place])

    def step(self, number: int) -> np.ndarray:
        """(epoch, sample), int64 [batch_size, 2], of a global step: the share of stream 0, of stream 1, ...

        `sample` is the place in the manifest, `epoch` that of the bucket.
        """
        which, place = self.locate(number)
        bucket = self.buckets[which]
        pairs = bucket.order.step(place, self.batch_size)
        return np.stack([pairs[:, 0], bucket.manifest_places(pairs[:, 1])], axis=1)

    def _compute_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each step of a cycle, and how many of that bucket the cycle has before it."""
        numbers = np.repeat(np.arange(len(self._steps), dtype=np.int32), self._steps)
        numbers = numbers[generator(self._seed, Purpose.BUCKET_ORDER, cycle).permutation(len(numbers))]
        by_bucket = np.argsort(numbers, kind="stable")
        starts = np.repeat(np.cumsum(self._steps) - self._steps, self._steps)
        before = np.empty(len(numbers), dtype=np.int64)
        before[by_bucket] = np.arange(len(numbers)) - starts
        return numbers, before


def samples_by_resolution(manifest: Manifest, index: Index, data: Data) -> dict[tuple[int, int], np.ndarray | None]:
    """(height, width) in pixels -> places in the manifest, uint32, sorted; None for all. Raises ValueError."""
    if manifest.buckets():
        if data.resolution is not None:
            raise ValueError(
                f"data.resolution is for pictures as they were found; those of {data.url} were packed at "
                f"{', '.join(manifest.buckets())}"
            )
        sizes = {name: parse_bucket(name) for name in manifest.buckets()}
        numbers = np.array([list(sizes).index(shard.bucket or "") for shard in manifest.shards])
        counts = [shard.num_samples for shard in manifest.shards]
        return _split(list(sizes.values()), np.repeat(numbers, counts))
    if data.resolution is None:
        raise ValueError(f"the pictures of {data.url} have sizes of their own: data.resolution must say which they get")
    if not data.aspect_buckets:
        return {(data.resolution, data.resolution): None}
    assert index.sizes is not None, "pictures as they were found have sizes in the index"
    table = bucket_table(data.resolution)
    blocks = range(0, len(index.sizes), BLOCK_SAMPLES)
    numbers = np.concatenate(
        [assign(index.sizes[start : start + BLOCK_SAMPLES], table).astype(np.int16) for start in blocks]
    )
    return _split(table, numbers)


def _split(sizes: list[tuple[int, int]], numbers: np.ndarray) -> dict[tuple[int, int], np.ndarray | None]:
    present = np.flatnonzero(np.bincount(numbers, minlength=len(sizes)))
    if len(present) == 1:
        return {sizes[int(present[0])]: None}
    return {sizes[number]: np.flatnonzero(numbers == number).astype(np.uint32) for number in present.tolist()}


def _count(samples: np.ndarray | None, manifest: Manifest) -> int:
    return manifest.num_samples if samples is None else len(samples)
