"""A data set as a source: tars that `megadit data index` has indexed where they lie, or one that was packed before."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from megadit.data.format.manifest import CAPTION, parse_bucket
from megadit.data.format.members import CorruptShardError, DataSet, Members, read_range
from megadit.data.packing.source import SourceError, SourceSample

FETCH_THREADS = 8  # Range GETs in flight
GAP_BYTES = 1 << 20  # what lies between two members is read with them if it is less: a request costs about as much
RANGE_BYTES = 16 << 20  # of one Range GET, unless one member has more


class IndexedSource:
    """The pictures and captions of the data set at `url`. Raises ManifestError, StorageError, SourceError."""

    in_order, has_metadata = True, False

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/").rpartition("/")[2]
        self._url, self._data = url, DataSet(url)
        manifest = self._manifest = self._data.manifest
        if manifest.image is None:
            raise SourceError(f"{url} has no pictures, only latents; pack the data set that they were made from")
        self.digest, self.has_captions = manifest.fingerprint, CAPTION in manifest.members
        self._kinds = (manifest.image.member, CAPTION) if self.has_captions else (manifest.image.member,)

    def key(self, number: int) -> str:
        return self._data.key(number)

    def select(self, where: Sequence[str]) -> np.ndarray:
        if where:
            raise SourceError(f"{self._url}: a data set has no metadata to choose by (--where {where[0]})")
        return np.arange(self._manifest.num_samples)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        if self._data.index.sizes is not None:
            return self._data.index.sizes[numbers].astype(np.int64)
        buckets = [parse_bucket(shard.bucket) for shard in self._manifest.shards if shard.bucket]
        return np.array(buckets, dtype=np.int64)[self._data.shards(numbers)]

    def classes(self, numbers: np.ndarray, label: str | None) -> tuple[tuple[str, ...], np.ndarray | None]:
        if label is not None:
            raise SourceError(f"{self._url}: a data set keeps the classes that it has; leave --label {label} out")
        labels = self._data.index.labels
        return self._manifest.labels, None if labels is None else np.asarray(labels[numbers])

    def read(self, numbers: np.ndarray) -> list[SourceSample]:
        ranges = self._data.ranges(numbers, self._kinds, GAP_BYTES, RANGE_BYTES)
        with ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="megadit-source") as pool:
            pieces = pool.map(lambda wanted: read_range(wanted)[1], ranges)
            contents, faults = self._data.gather(numbers, ranges, pieces)
        if faults:
            raise CorruptShardError(faults[min(faults)])
        return [self._to_sample(*pair) for pair in zip(numbers.tolist(), contents, strict=True)]

    def _to_sample(self, number: int, members: Members) -> SourceSample:
        picture, *caption = (bytes(members[kind]) for kind in self._kinds)
        try:
            return SourceSample(self.key(number), picture, caption[0].decode() if caption else None)
        except UnicodeDecodeError as error:
            raise SourceError(f"{self._url}: the caption of {self.key(number)!r} is not UTF-8: {error}") from None
