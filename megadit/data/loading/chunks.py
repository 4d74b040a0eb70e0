"""Samples by their place in the manifest: coalesced Range GETs, every member checked against its CRC-32.

One GET has the members of neighbours. It reads over what nobody asked for (SA-1B's JSON between two pictures) where
that is at most GAP_BYTES, because a request costs more than so many bytes, and leaves out what is larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megadit.data.format.members import Bytes, CorruptShardError, DataSet, Members, Range, read_range
from megadit.data.loading.decode import Decoder
from megadit.data.loading.pages import Pages
from megadit.data.storage import ChangedError, Client, StorageError
from megadit.data.storage.cache import ChunkCache

GAP_BYTES = 256 << 10
LARGE_BYTES = 1 << 20  # from here on memory is that of `Pages`


@dataclass(frozen=True)
class Chunk:
    """Samples that were read together. contents: kind -> bytes of each, None where `faults` says what is wrong."""

    samples: list[int]
    contents: list[Members | None]
    faults: dict[int, str]


class ChunkReader:
    """The data set at `url`; with_features: as of its Decoder. Methods may be called from several threads.

    Raises ManifestError and StorageError.
    """

    def __init__(
        self,
        url: str,
        client: Client = "boto3",
        cache: ChunkCache | None = None,
        retry_seconds: float | None = None,
        with_features: bool = False,
    ) -> None:
        self._data = DataSet(url, client, retry_seconds)
        self.manifest, self.index = self._data.manifest, self._data.index
        self.decoder = Decoder(self.manifest, with_features)
        self._cache = cache
        self.pages = Pages()

    def close(self) -> None:
        """Give up on what other threads are reading, where the server does not answer."""
        self._data.close()

    def label(self, sample: int) -> int:
        """The class of a sample, a place in the manifest's `labels`; 0 where the data set has none."""
        return 0 if self.index.labels is None else int(self.index.labels[sample])

    def name(self, sample: int) -> str:
        """The address of a sample, for messages."""
        return self._data.name(sample)

    def read(self, samples: Sequence[int] | np.ndarray) -> dict[int, Members]:
        """The members of each sample by kind. Raises CorruptShardError for one that is not what was packed."""
        chunk = self.read_chunk(np.unique(np.asarray(samples, dtype=np.int64)))
        if chunk.faults:
            raise CorruptShardError(next(iter(chunk.faults.values())))
        return dict(zip(chunk.samples, (content for content in chunk.contents if content is not None), strict=True))

    def read_chunk(self, samples: np.ndarray, ranges: Sequence[Range] | None = None) -> Chunk:
        """The members of samples, int64 [C]; one that is corrupt at rest has a fault instead. Raises StorageError.

        ranges: what `ranges(samples)` gave, where that was called before.
        """
        ranges = self.ranges(samples) if ranges is None else ranges
        contents, faults = self._data.gather(samples, ranges, map(self._read, ranges))
        sound = [None if row in faults else content for row, content in enumerate(contents)]
        return Chunk(samples.tolist(), sound, {int(samples[row]): fault for row, fault in faults.items()})

    def ranges(self, samples: np.ndarray) -> list[Range]:
        """What is read for samples, int64 [C], by file and offset."""
        return self._data.ranges(samples, self.decoder.kinds, GAP_BYTES)

    def bytes_read(self, first: int, last: int, samples: np.ndarray | None = None) -> np.ndarray:
        """Bytes that each of the samples [first, last) of a bucket adds to a read of neighbours, int64.

        samples: places of the bucket's samples in the manifest, or None for all. What lies between is counted, rather
        once too often than not at all: a sum over neighbours is never less than their `ranges` have.
        """
        following = min(last + 1, self.manifest.num_samples if samples is None else len(samples))
        which: slice | np.ndarray = slice(first, following) if samples is None else samples[first:following]
        sizes = np.zeros(following - first, dtype=np.int64)  # of the members
        gaps = np.zeros_like(sizes)  # after each of them, to the next sample's of its kind
        starts, ends = np.full_like(sizes, np.iinfo(np.int64).max), np.zeros_like(sizes)
        for kind in self.decoder.kinds:
            places = self.index.places[kind][which]
            sizes += places["size"]
            kind_ends = places["offset"] + places["size"]
            gaps[:-1] += _read_over(places["offset"][1:] - kind_ends[:-1])
            np.minimum(starts, places["offset"], out=starts)
            np.maximum(ends, kind_ends, out=ends)
        # Below 0 where members of several samples are mixed, or a new file begins.
        apart = np.append(starts[1:] - ends[:-1], 0)
        together = (apart >= 0) & (ends - starts <= sizes + GAP_BYTES * len(self.decoder.kinds))
        gaps = np.where(together, ends - starts - sizes + _read_over(apart), gaps)
        return (sizes + gaps)[: last - first]

    def _read(self, wanted: Range) -> list[Bytes | None]:
        """The members of a range; None for one that is corrupt at rest."""
        if self._cache is not None:
            kept = self._cache.get(wanted.file.identity, wanted.start, wanted.end)
            if kept is not None and None not in (pieces := wanted.sound_pieces(kept)):
                return pieces
        data, pieces = read_range(wanted, self._get)
        if self._cache is not None and None not in pieces:
            self._cache.put(wanted.file.identity, wanted.start, data)
        return pieces

    def _get(self, wanted: Range) -> Bytes:
        size = wanted.end - wanted.start
        try:
            if size < LARGE_BYTES:
                return wanted.get()
            target, data = self.pages.take(size)
            wanted.file.store.copy(wanted.file.name, wanted.start, wanted.end, target, wanted.file.etag)
            return data
        except ChangedError as error:
            raise StorageError(f"the index is older than the tar: {error}; index it again") from error


def _read_over(gaps: np.ndarray) -> np.ndarray:
    """The bytes of gaps that are read over."""
    return np.where((gaps > 0) & (gaps <= GAP_BYTES), gaps, 0)
