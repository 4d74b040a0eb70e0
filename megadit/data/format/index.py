"""Where each member of each sample lies: columns of numbers, one file each, memory-mapped.

<data set>/index/key.npy           bytes [N]
<data set>/index/place.<kind>.npy  offset int64, size uint32, crc32 uint32 [N]: 16 bytes a sample and member kind
<data set>/index/size.npy          uint16 [N, 2], height and width of the stored pictures, where they are not all one
<data set>/index/label.npy         int32 [N], in a data set with labels

The manifest beside it has the sha256 of each file. Equal columns are equal bytes.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megadit.data.storage import Store
from megadit.data.storage.local_copy import local_copy

INDEX_FOLDER = "index"
PLACE = np.dtype([("offset", "<i8"), ("size", "<u4"), ("crc32", "<u4")])


@dataclass(frozen=True)
class Index:
    """N samples in the order of the shards.

    keys: bytes [N]; places: kind of member -> PLACE [N]; sizes: uint16 [N, 2] height and width of the pictures, or None
    where each has the size of its shard's bucket; labels: int32 [N], or None in a data set without.
    """

    keys: np.ndarray
    places: Mapping[str, np.ndarray]
    sizes: np.ndarray | None = None
    labels: np.ndarray | None = None

    def columns(self) -> dict[str, np.ndarray]:
        """The columns by the names of their files."""
        columns = {"key": self.keys, **{f"place.{kind}": places for kind, places in self.places.items()}}
        optional = {"size": self.sizes, "label": self.labels}
        return columns | {name: column for name, column in optional.items() if column is not None}

    def write(self, store: Store) -> dict[str, str]:
        """Write the files; column -> sha256. Raises StorageError."""
        digests = {}
        for name, column in self.columns().items():
            data = _to_bytes(column)
            store.put(_file(name), data)
            digests[name] = hashlib.sha256(data).hexdigest()
        return digests

    @staticmethod
    def read(store: Store, digests: Mapping[str, str]) -> "Index":
        """Map the files whose sha256 a manifest states; those in S3 are copied to this machine once.

        Raises StorageError, also where a file is not the one that the manifest states.
        """
        columns = {
            name: np.load(local_copy(store, _file(name), sha256), mmap_mode="r", allow_pickle=False)
            for name, sha256 in digests.items()
        }
        places = {name.removeprefix("place."): c for name, c in columns.items() if name.startswith("place.")}
        return Index(columns["key"], places, columns.get("size"), columns.get("label"))


def _to_bytes(column: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, column, allow_pickle=False)
    return buffer.getvalue()


def _file(column: str) -> str:
    return f"{INDEX_FOLDER}/{column}.npy"
