"""Samples by their place in the manifest: coalesced Range GETs, every member checked against its CRC-32.

One GET has the members of neighbours. It reads over what nobody asked for (SA-1B's JSON between two pictures) where
that is at most GAP_BYTES, because a request costs more than so many bytes, and leaves out what is larger.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megadit import checksums
from megadit.data.format.manifest import CAPTION, Manifest
from megadit.data.loading.decode import Decoder
from megadit.data.loading.pages import Pages
from megadit.data.storage import ChangedError, Client, StorageError, Store, open_store
from megadit.data.storage.cache import ChunkCache

log = logging.getLogger(__name__)

GAP_BYTES = 256 << 10
LARGE_BYTES = 1 << 20  # from here on memory is that of `Pages`


class CorruptShardError(StorageError):
    """A shard whose bytes are not those that were packed."""


class _Member(NamedTuple):
    offset: int
    size: int
    crc32: int
    row: int  # which of the samples asked for
    kind: str


@dataclass(frozen=True)
class Range:
    """Bytes [start, end) of one file, and the members that are wanted of them, by their offset."""

    store: Store
    name: str
    etag: str | None
    identity: str  # of the file's content: its ETag or sha256
    start: int
    end: int
    members: list[_Member]


@dataclass(frozen=True)
class Chunk:
    """Samples that were read together. contents: kind -> bytes of each, None where `faults` says what is wrong."""

    samples: list[int]
    contents: list[dict[str, memoryview] | None]
    faults: dict[int, str]


class ChunkReader:
    """The data set at `url`. Raises ManifestError and StorageError. Methods may be called from several threads."""

    def __init__(
        self,
        url: str,
        client: Client = "boto3",
        cache: ChunkCache | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        self.manifest = Manifest.load(url)
        self._store = open_store(url, client, retry_seconds)
        root = self.manifest.root
        self._shards = self._store if root is None else open_store(root, client, retry_seconds)
        self.index = self.manifest.load_index(self._store)
        self.decoder = Decoder(self.manifest)
        self._ends = np.cumsum([shard.num_samples for shard in self.manifest.shards])
        self._cache = cache
        self.pages = Pages()

    def close(self) -> None:
        """Give up on what other threads are reading, where the server does not answer."""
        self._store.close()
        self._shards.close()

    def label(self, sample: int) -> int:
        """The class of a sample, a place in the manifest's `labels`; 0 where the data set has none."""
        return 0 if self.index.labels is None else int(self.index.labels[sample])

    def name(self, sample: int) -> str:
        """The address of a sample, for messages."""
        return f"{self._shards.url(self._shard(sample))}: {self.index.keys[sample].decode()}"

    def read(self, samples: Sequence[int] | np.ndarray) -> dict[int, dict[str, memoryview]]:
        """The members of each sample by kind. Raises CorruptShardError for one that is not what was packed."""
        chunk = self.read_chunk(np.unique(np.asarray(samples, dtype=np.int64)))
        if chunk.faults:
            raise CorruptShardError(next(iter(chunk.faults.values())))
        return dict(zip(chunk.samples, (content for content in chunk.contents if content is not None), strict=True))

    def read_chunk(self, samples: np.ndarray, ranges: Sequence[Range] | None = None) -> Chunk:
        """The members of samples, int64 [C]; one that is corrupt at rest has a fault instead. Raises StorageError.

        ranges: what `ranges(samples)` gave, where that was called before.
        """
        contents: list[dict[str, memoryview]] = [{} for _ in samples]
        faults: dict[int, str] = {}
        for part in self.ranges(samples) if ranges is None else ranges:
            for member, piece in zip(part.members, self._read(part), strict=True):
                if piece is not None:
                    contents[member.row][member.kind] = piece
                    continue
                key = self.index.keys[samples[member.row]].decode()
                faults[member.row] = (
                    f"{part.store.url(part.name)}: member {key}.{member.kind}: CRC-32 differs, twice: "
                    "the shard's bytes changed since it was packed"
                )
        sound = [None if row in faults else content for row, content in enumerate(contents)]
        return Chunk(samples.tolist(), sound, {int(samples[row]): fault for row, fault in faults.items()})

    def ranges(self, samples: np.ndarray) -> list[Range]:
        """What is read for samples, int64 [C], by file and offset."""
        found: list[tuple[int, bool, _Member]] = []
        shards = np.searchsorted(self._ends, samples, side="right").tolist()
        for kind in self.decoder.kinds:
            in_captions = kind == CAPTION
            places = self.index.places[kind][samples].tolist()
            for row, (shard, (offset, size, crc32)) in enumerate(zip(shards, places, strict=True)):
                apart = in_captions and self.manifest.shards[shard].captions is not None
                found.append((shard, apart, _Member(offset, size, crc32, row, kind)))
        found.sort()
        return list(self._coalesced(found))

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

    def _coalesced(self, found: list[tuple[int, bool, _Member]]) -> Iterator[Range]:
        """Neighbours of one file as one range."""
        first = 0
        for place in range(1, len(found) + 1):
            shard, apart, member = found[place - 1]
            if place < len(found):
                following = found[place]
                gap = following[2].offset - (member.offset + member.size)
                if following[:2] == (shard, apart) and gap <= GAP_BYTES:
                    continue
            facts = self.manifest.shards[shard]
            members = [item[2] for item in found[first:place]]
            name = facts.captions if apart else facts.name
            assert name is not None
            yield Range(
                store=self._store if apart else self._shards,
                name=name,
                etag=None if apart else facts.etag,
                identity=(None if apart else facts.etag or facts.sha256) or f"{self.manifest.fingerprint}/{name}",
                start=members[0].offset,
                end=max(item.offset + item.size for item in members),
                members=members,
            )
            first = place

    def _read(self, part: Range) -> list[memoryview | None]:
        """The members of a range; None for one that is corrupt at rest."""
        if self._cache is not None:
            kept = self._cache.get(part.identity, part.start, part.end)
            if kept is not None and None not in (pieces := _sound_pieces(part, kept)):
                return pieces
        data = self._get(part)
        pieces = _sound_pieces(part, data)
        if None in pieces:
            # Bytes can flip on the way; a second copy with the same fault means that the shard itself is bad.
            log.warning(
                "%s: CRC-32 of %d members differs; reading it again", part.store.url(part.name), pieces.count(None)
            )
            data = self._get(part)
            pieces = _sound_pieces(part, data)
        if self._cache is not None and None not in pieces:
            self._cache.put(part.identity, part.start, data)
        return pieces

    def _get(self, part: Range) -> bytes | memoryview:
        size = part.end - part.start
        try:
            if size < LARGE_BYTES:
                return part.store.get(part.name, part.start, part.end, part.etag)
            target, data = self.pages.take(size)
            part.store.copy(part.name, part.start, part.end, target, part.etag)
            return data
        except ChangedError as error:
            raise StorageError(f"the index is older than the tar: {error}; index it again") from error

    def _shard(self, sample: int) -> str:
        return self.manifest.shards[int(np.searchsorted(self._ends, sample, side="right"))].name


def _read_over(gaps: np.ndarray) -> np.ndarray:
    """The bytes of gaps that are read over."""
    return np.where((gaps > 0) & (gaps <= GAP_BYTES), gaps, 0)


def _sound_pieces(part: Range, data: bytes | memoryview) -> list[memoryview | None]:
    """The members of a range; None for one whose CRC-32 is another one."""
    view, pieces = memoryview(data), list[memoryview | None]()
    for member in part.members:
        start = member.offset - part.start
        piece = view[start : start + member.size]
        pieces.append(piece if checksums.crc32(piece) == member.crc32 else None)
    return pieces
