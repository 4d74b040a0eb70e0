"""A data set as a source: tars that `megadit data index` has indexed where they lie, or one that was packed before."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megadit import checksums
from megadit.data.format.manifest import CAPTION, Manifest, parse_bucket
from megadit.data.packing.source import SourceError, SourceSample
from megadit.data.storage import StorageError, Store, open_store

FETCH_THREADS = 8  # Range GETs in flight
GAP_BYTES = 1 << 20  # what lies between two members is read with them if it is less: a request costs about as much
RANGE_BYTES = 16 << 20  # of one Range GET, unless one member has more


class IndexedSource:
    """The pictures and captions of the data set at `url`. Raises ManifestError, StorageError, SourceError."""

    in_order, has_metadata = True, False

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/").rpartition("/")[2]
        manifest, store = Manifest.load(url), open_store(url)
        if manifest.image is None:
            raise SourceError(f"{url} has no pictures, only latents; pack the data set that they were made from")
        self.digest, self.has_captions = manifest.fingerprint, CAPTION in manifest.members
        self._url, self._manifest, self._picture = url, manifest, manifest.image.member
        self._index = manifest.load_index(store)
        self._captions, self._tars = store, open_store(manifest.root) if manifest.root else store
        self._ends = np.cumsum([shard.num_samples for shard in manifest.shards])

    def key(self, number: int) -> str:
        return self._index.keys[number].decode()

    def select(self, where: Sequence[str]) -> np.ndarray:
        if where:
            raise SourceError(f"{self._url}: a data set has no metadata to choose by (--where {where[0]})")
        return np.arange(self._manifest.num_samples)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        if self._index.sizes is not None:
            return self._index.sizes[numbers].astype(np.int64)
        buckets = [parse_bucket(shard.bucket) for shard in self._manifest.shards if shard.bucket]
        return np.array(buckets, dtype=np.int64)[self._shards_of(numbers)]

    def classes(self, numbers: np.ndarray, label: str | None) -> tuple[tuple[str, ...], np.ndarray | None]:
        if label is not None:
            raise SourceError(f"{self._url}: a data set keeps the classes that it has; leave --label {label} out")
        labels = self._index.labels
        return self._manifest.labels, None if labels is None else np.asarray(labels[numbers])

    def read(self, numbers: np.ndarray) -> list[SourceSample]:
        pictures = self._read_members(self._picture, numbers)
        captions = self._read_members(CAPTION, numbers) if self.has_captions else {}
        return [
            SourceSample(self.key(number), pictures[number], self._decode_caption(number, captions.get(number)))
            for number in numbers.tolist()
        ]

    def _decode_caption(self, number: int, caption: bytes | None) -> str | None:
        try:
            return None if caption is None else caption.decode()
        except UnicodeDecodeError as error:
            raise SourceError(f"{self._url}: the caption of {self.key(number)!r} is not UTF-8: {error}") from None

    def _shards_of(self, numbers: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, numbers, side="right")

    def _read_members(self, kind: str, numbers: np.ndarray) -> dict[int, bytes]:
        """The members of one kind by sample, fetched in few ranges."""
        found: dict[int, bytes] = {}
        with ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="megadit-source") as pool:
            for part in pool.map(self._read_range, self._ranges(kind, numbers)):
                found |= part
        return found

    def _ranges(self, kind: str, numbers: np.ndarray) -> Iterator["_Range"]:
        """Ranges of one file each that together have the members of `numbers`."""
        shard_of = self._shards_of(numbers)
        for place in np.unique(shard_of).tolist():
            shard = self._manifest.shards[place]
            beside = kind == CAPTION and shard.captions is not None
            store, name = (self._captions, shard.captions) if beside else (self._tars, shard.name)
            assert name is not None
            ours = numbers[shard_of == place]
            places = self._index.places[kind][ours]
            order = np.argsort(places["offset"], kind="stable")
            first = 0
            for last in range(1, len(order) + 1):
                if last == len(order) or _apart(places[order[first]], places[order[last - 1]], places[order[last]]):
                    chosen = order[first:last]
                    etag = None if beside else shard.etag
                    yield _Range(store, name, etag, kind, ours[chosen], places[chosen])
                    first = last

    def _read_range(self, part: "_Range") -> dict[int, bytes]:
        members, corrupt = part.fetch()
        if corrupt is not None:  # bytes can flip on the way
            members, corrupt = part.fetch()
        if corrupt is not None:
            raise StorageError(
                f"{part.store.url(part.name)}: member {self.key(corrupt)}.{part.kind}: CRC-32 differs, twice: "
                "the file changed since it was indexed"
            )
        return members


@dataclass(frozen=True)
class _Range:
    """Members of one kind that are read by one request: samples int64 [N], places PLACE [N], by their offsets."""

    store: Store
    name: str
    etag: str | None
    kind: str
    samples: np.ndarray
    places: np.ndarray

    def fetch(self) -> tuple[dict[int, bytes], int | None]:
        """The members by sample; a sample whose member's CRC-32 differs."""
        start, end = int(self.places[0]["offset"]), _end(self.places[-1])
        data = self.store.get(self.name, start, end, self.etag)
        members = {}
        for sample, (offset, size, crc32) in zip(self.samples.tolist(), self.places.tolist(), strict=True):
            member = data[offset - start : offset - start + size]
            if checksums.crc32(member) != crc32:
                return {}, sample
            members[sample] = member
        return members, None


def _apart(first: np.void, last: np.void, after: np.void) -> bool:
    """Whether `after` is to be read by another request than the members from `first` to `last`."""
    return bool(after["offset"] - _end(last) > GAP_BYTES or _end(after) - first["offset"] > RANGE_BYTES)


def _end(place: np.void) -> int:
    return int(place["offset"]) + int(place["size"])
