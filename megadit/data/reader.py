"""Samples by their place in the manifest: coalesced Range GETs, every member checked against its CRC-32."""

import io
import logging
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadit.data.batch import TextFeatures
from megadit.data.manifest import IMAGE, MEMBERS, POOLED, TEXT, Manifest
from megadit.data.storage import StorageError, open_store

log = logging.getLogger(__name__)


class CorruptShardError(StorageError):
    """A shard whose bytes are not those that were packed."""


class Reader:
    """The data set at `url`. Raises ManifestError and StorageError. `read` may be called from several threads."""

    def __init__(self, url: str) -> None:
        self.manifest = Manifest.load(url)
        self._store = open_store(url)
        self._index = self.manifest.load_index(self._store)

    def read(self, samples: Sequence[int] | np.ndarray) -> dict[int, dict[str, bytes]]:
        """The members of each sample by kind. One Range GET for each run of neighbours within a shard."""
        found: dict[int, dict[str, bytes]] = {}
        for run in self._runs(np.unique(np.asarray(samples, dtype=np.int64))):
            members, corrupt = self._read_run(run)
            if corrupt:
                # Bytes can flip on the way; a second copy with the same fault means that the shard itself is bad.
                log.warning("%s: CRC-32 differs; reading it again", corrupt)
                members, corrupt = self._read_run(run)
            if corrupt:
                raise CorruptShardError(
                    f"{corrupt}: CRC-32 differs, twice: the shard's bytes changed since it was packed"
                )
            found |= members
        return found

    def label(self, sample: int) -> int:
        """The class of a sample, a place in the manifest's `labels`; 0 where the data set has none."""
        return 0 if self._index.label is None else int(self._index.label[sample])

    def decode(self, members: dict[str, bytes]) -> tuple[Tensor, TextFeatures]:
        """Picture float32 [C, H, W] in [-1, 1] and text features of one sample."""
        with Image.open(io.BytesIO(members[IMAGE])) as picture:
            pixels_HWC = torch.from_numpy(np.array(picture.convert("RGB")))
        image_CHW = pixels_HWC.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0)
        return image_CHW.contiguous(), TextFeatures(_decode_array(members[TEXT]), _decode_array(members[POOLED]))

    def _runs(self, samples: np.ndarray) -> list[np.ndarray]:
        """Split sorted samples where they are not neighbours, and where the shard changes."""
        breaks = (np.diff(samples) != 1) | (np.diff(self._index.shard[samples]) != 0)
        return np.split(samples, np.flatnonzero(breaks) + 1)

    def _read_run(self, run: np.ndarray) -> tuple[dict[int, dict[str, bytes]], str]:
        """The members of the neighbours `run`, and the address of the first corrupt one ("" when all are sound)."""
        index, first, last = self._index, run[0], run[-1]
        shard = self.manifest.shards[index.shard[first]].name
        start = int(index.offset[MEMBERS[0]][first])
        end = int(index.offset[MEMBERS[-1]][last] + index.size[MEMBERS[-1]][last])
        data = memoryview(self._store.get(shard, start, end))
        found: dict[int, dict[str, bytes]] = {}
        for sample in run:
            members: dict[str, bytes] = {}
            for kind in MEMBERS:
                offset = int(index.offset[kind][sample]) - start
                members[kind] = bytes(data[offset : offset + int(index.size[kind][sample])])
                if zlib.crc32(members[kind]) != index.crc32[kind][sample]:
                    return {}, f"{self._store.url(shard)}: member {index.keys[sample].decode()}.{kind}"
            found[int(sample)] = members
        return found, ""


def _decode_array(data: bytes) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32))
