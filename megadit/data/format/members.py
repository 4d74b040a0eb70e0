"""The members of a data set as they are stored, without decoding or order: for looking at it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadit import checksums
from megadit.data.format.manifest import CAPTION, METADATA, Manifest, Shard
from megadit.data.storage import StorageError, Store, open_store


@dataclass(frozen=True)
class ShardFile:
    """A file with the members `kinds` of the samples [first, last) of a shard: its tar, or its captions."""

    store: Store
    name: str
    kinds: tuple[str, ...]
    shard: Shard
    first: int
    last: int

    @property
    def etag(self) -> str | None:
        """The stated ETag, which a file of captions does not have."""
        return self.shard.etag if self.name == self.shard.name else None


class Members:
    """The data set at `url`. Raises ManifestError and StorageError."""

    def __init__(self, url: str) -> None:
        store = open_store(url)
        self.manifest = Manifest.load(url)
        self.index = self.manifest.load_index(store)
        self.files: list[ShardFile] = []
        tars = open_store(self.manifest.root) if self.manifest.root else store
        first = 0
        for shard in self.manifest.shards:
            last = first + shard.num_samples
            beside = {CAPTION} if shard.captions else set()
            inside = tuple(kind for kind in self.manifest.members if kind not in beside)
            self.files.append(ShardFile(tars, shard.name, inside, shard, first, last))
            if shard.captions:
                self.files.append(ShardFile(store, shard.captions, (CAPTION,), shard, first, last))
            first = last

    def get(self, kind: str, sample: int) -> bytes:
        """One member, checked. Raises StorageError."""
        file = next(file for file in self.files if kind in file.kinds and file.first <= sample < file.last)
        offset, size, crc32 = self.index.places[kind][sample].item()
        data = file.store.get(file.name, offset, offset + size, file.etag)
        if checksums.crc32(data) != crc32:
            key = self.index.keys[sample].decode()
            raise StorageError(f"{file.store.url(file.name)}: member {key}.{kind}: CRC-32 differs")
        return data

    def caption(self, sample: int) -> str | None:
        """The caption, by itself or in the metadata; None where there is none. Raises StorageError."""
        if CAPTION in self.manifest.members:
            return self.get(CAPTION, sample).decode()
        if METADATA in self.manifest.members:
            record: Any = json.loads(self.get(METADATA, sample))
            return record.get("caption") if isinstance(record, dict) else None
        return None

    def evenly(self, num_samples: int) -> np.ndarray:
        """At most so many samples, from the first to the last, int64."""
        return np.unique(np.linspace(0, self.manifest.num_samples - 1, num_samples).round().astype(np.int64))

    def rows(self, file: ShardFile, share: float) -> Iterator[tuple[int, str]]:
        """Sample and kind of the members of a file, by place; of a share of the samples, in blocks of 16."""
        samples = np.arange(file.first, file.last)
        blocks = samples // 16
        samples = samples[np.floor((blocks + 1) * share) > np.floor(blocks * share)]
        offsets = np.concatenate([self.index.places[kind]["offset"][samples] for kind in file.kinds])
        for place in np.argsort(offsets, kind="stable").tolist():
            yield int(samples[place % len(samples)]), file.kinds[place // len(samples)]
