"""The members of a data set as they are stored: read by their places, checked against their CRC-32, not decoded.

A member is (file, offset, size, crc32). Neighbours in one file are read together; bytes that differ are read again, for
they can flip on the way, and a second copy with the same fault means that the file itself is bad.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megadit import checksums
from megadit.data.format.manifest import CAPTION, METADATA, Manifest, ShardFacts
from megadit.data.storage import Client, StorageError, Store, open_store

log = logging.getLogger(__name__)

Bytes = bytes | memoryview
Members = dict[str, Bytes]  # of a sample, by kind


class CorruptShardError(StorageError):
    """A shard whose bytes are not those that were packed."""


class Member(NamedTuple):
    """Where a member lies in its file, and which it is: of the sample in place `row` of those asked for."""

    offset: int
    size: int
    crc32: int
    row: int
    kind: str

    @property
    def end(self) -> int:
        return self.offset + self.size

    def is_sound(self, blocks: Iterable[Bytes]) -> bool:
        """Whether these are its bytes, one block after the other."""
        crc32 = 0
        for block in blocks:
            crc32 = checksums.crc32(block, crc32)
        return crc32 == self.crc32

    def fault(self, file: "ShardFile", key: str, how: str) -> str:
        """What is wrong with a member: file, member and byte. The key is its sample's."""
        return f"{file.url}: member {key}.{self.kind}: {how}, at byte {self.offset}"


@dataclass(frozen=True)
class ShardFile:
    """A file with the members `kinds` of the samples [first, last) of a shard: its tar, or its captions.

    etag: as stated, which captions do not have; identity: of its content, an ETag or a sha256.
    """

    store: Store
    name: str
    kinds: tuple[str, ...]
    shard: ShardFacts
    first: int
    last: int
    etag: str | None
    identity: str

    @property
    def url(self) -> str:
        return self.store.url(self.name)

    @property
    def is_tar(self) -> bool:
        return self.name == self.shard.name


@dataclass(frozen=True)
class Range:
    """Bytes [start, end) of one file, and the members that are wanted of them, by their offset."""

    file: ShardFile
    start: int
    end: int
    members: list[Member]

    def get(self) -> Bytes:
        """The bytes as they are stored. Raises StorageError."""
        return self.file.store.get(self.file.name, self.start, self.end, self.file.etag)

    def sound_pieces(self, data: Bytes) -> list[Bytes | None]:
        """The members in the bytes of the range; None for one whose CRC-32 is another one."""
        view, pieces = memoryview(data), list[Bytes | None]()
        for member in self.members:
            piece = view[member.offset - self.start : member.end - self.start]
            pieces.append(piece if member.is_sound((piece,)) else None)
        return pieces


def read_range(wanted: Range, get: Callable[[Range], Bytes] = Range.get) -> tuple[Bytes, list[Bytes | None]]:
    """The bytes of a range, and its members; None for one that is corrupt at rest. Raises StorageError."""
    data = get(wanted)
    pieces = wanted.sound_pieces(data)
    if None in pieces:
        log.warning("%s: CRC-32 of %d members differs; reading it again", wanted.file.url, pieces.count(None))
        data = get(wanted)
        pieces = wanted.sound_pieces(data)
    return data, pieces


class DataSet:
    """The data set at `url`. Raises ManifestError and StorageError. Methods may be called from several threads."""

    def __init__(self, url: str, client: Client = "boto3", retry_seconds: float | None = None) -> None:
        store = open_store(url, client, retry_seconds)
        self.manifest = Manifest.load(url)
        tars = open_store(self.manifest.root, client, retry_seconds) if self.manifest.root else store
        self.index = self.manifest.load_index(store)
        self.files: list[ShardFile] = []
        self._stores = (store, tars)
        self._ends = np.cumsum([shard.num_samples for shard in self.manifest.shards])
        self._tars: list[int] = []  # of each shard, its place in `files`; that of its captions follows
        for shard, last in zip(self.manifest.shards, self._ends.tolist(), strict=True):
            first, named = last - shard.num_samples, f"{self.manifest.fingerprint}/"
            beside = {CAPTION} if shard.captions else set()
            inside = tuple(kind for kind in self.manifest.members if kind not in beside)
            identity = shard.etag or shard.sha256 or named + shard.name
            self._tars.append(len(self.files))
            self.files.append(ShardFile(tars, shard.name, inside, shard, first, last, shard.etag, identity))
            if shard.captions:
                name = shard.captions
                self.files.append(ShardFile(store, name, (CAPTION,), shard, first, last, None, named + name))

    def close(self) -> None:
        """Give up on what other threads are reading, where the server does not answer."""
        for store in self._stores:
            store.close()

    def key(self, sample: int) -> str:
        return self.index.keys[sample].decode()

    def shards(self, samples: np.ndarray) -> np.ndarray:
        """The shard of each sample, its place in the manifest, int64."""
        return np.searchsorted(self._ends, samples, side="right")

    def name(self, sample: int) -> str:
        """The address of a sample, for messages."""
        return f"{self.files[self._tars[int(self.shards(np.array(sample)))]].url}: {self.key(sample)}"

    def ranges(
        self, samples: np.ndarray, kinds: Sequence[str], gap_bytes: int, most_bytes: int | None = None
    ) -> list[Range]:
        """What is read for samples, int64 [N], by file and offset.

        gap_bytes: what lies between two members is read with them if it is at most that, since a request costs as much;
        most_bytes: of a range with more than one member.
        """
        found: list[tuple[int, Member]] = []
        shards = self.shards(samples).tolist()
        for kind in kinds:
            beside = kind == CAPTION
            places = self.index.places[kind][samples].tolist()
            for row, (shard, (offset, size, crc32)) in enumerate(zip(shards, places, strict=True)):
                apart = beside and self.manifest.shards[shard].captions is not None
                found.append((self._tars[shard] + apart, Member(offset, size, crc32, row, kind)))
        found.sort()
        return list(self._coalesced(found, gap_bytes, most_bytes))

    def _coalesced(self, found: list[tuple[int, Member]], gap_bytes: int, most_bytes: int | None) -> Iterator[Range]:
        """Neighbours of one file as one range."""
        first = 0
        for place in range(1, len(found) + 1):
            file, member = found[place - 1]
            if place < len(found):
                next_file, following = found[place]
                near = following.offset - member.end <= gap_bytes
                fits = most_bytes is None or following.end - found[first][1].offset <= most_bytes
                if next_file == file and near and fits:
                    continue
            members = [item[1] for item in found[first:place]]
            yield Range(self.files[file], members[0].offset, max(item.end for item in members), members)
            first = place

    def gather(
        self, samples: np.ndarray, ranges: Sequence[Range], pieces: Iterable[list[Bytes | None]]
    ) -> tuple[list[Members], dict[int, str]]:
        """The members of samples, int64 [N], from their ranges' pieces; by row what is wrong with a corrupt one."""
        contents: list[Members] = [{} for _ in samples]
        faults: dict[int, str] = {}
        for wanted, found in zip(ranges, pieces, strict=True):
            for member, piece in zip(wanted.members, found, strict=True):
                if piece is not None:
                    contents[member.row][member.kind] = piece
                    continue
                fault = member.fault(wanted.file, self.key(samples[member.row]), "CRC-32 differs, twice")
                faults[member.row] = f"{fault}: the file changed since it was packed or indexed"
        return contents, faults

    def get(self, kind: str, sample: int) -> bytes:
        """One member. Raises StorageError."""
        samples = np.array([sample])
        ranges = self.ranges(samples, (kind,), gap_bytes=0)
        contents, faults = self.gather(samples, ranges, (read_range(wanted)[1] for wanted in ranges))
        if faults:
            raise CorruptShardError(faults[0])
        return bytes(contents[0][kind])

    def caption(self, sample: int) -> str | None:
        """The caption, by itself or in the metadata; None where there is none. Raises StorageError."""
        if CAPTION in self.manifest.members:
            return self.get(CAPTION, sample).decode()
        if METADATA in self.manifest.members:
            record: Any = json.loads(self.get(METADATA, sample))
            return record.get("caption") if isinstance(record, dict) else None
        return None

    def members_of(self, file: ShardFile, share: float = 1.0) -> Iterator[Member]:
        """The members of a file by their offsets; `row` is the sample. Of a share of the samples, in blocks of 16."""
        samples = np.arange(file.first, file.last)
        blocks = samples // 16
        samples = samples[np.floor((blocks + 1) * share) > np.floor(blocks * share)]
        places = np.concatenate([self.index.places[kind][samples] for kind in file.kinds])
        for place in np.argsort(places["offset"], kind="stable").tolist():
            number, row = divmod(place, len(samples))
            offset, size, crc32 = places[place].item()
            yield Member(offset, size, crc32, int(samples[row]), file.kinds[number])
