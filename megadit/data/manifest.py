"""What a packed data set says about itself: `manifest.json` and `index.npz` beside its shards.

The packer writes the manifest last, so a folder without one is not a data set, and one with one is whole. The index has
the place and the CRC-32 of every member of every shard in columns, so a sample is one Range GET away.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megadit.data.storage import MissingError, Store, open_store

FORMAT_VERSION = 1
MANIFEST_NAME, INDEX_NAME = "manifest.json", "index.npz"

IMAGE, METADATA, TEXT, POOLED = "png", "json", "text.npy", "pooled.npy"
MEMBERS = (IMAGE, METADATA, TEXT, POOLED)  # kinds of members, in the order in which a shard has them
MEMBER_COLUMNS = {"offset": np.int64, "size": np.int32, "crc32": np.uint32}


class ManifestError(ValueError):
    """A data set that is missing, unknown, or not what it says. One line."""


class _Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageFacts(_Node):
    """Pictures: PNG, RGB, size x size, resized once with the named filter of Pillow."""

    size: int = Field(ge=1)
    channels: int = 3
    resize: str = "lanczos"


class TextFacts(_Node):
    """Text features: float16, tokens [L, dim] with L <= max_tokens, pooled [pooled_dim]."""

    encoder: str
    weights_sha256: str
    dim: int
    pooled_dim: int
    max_tokens: int
    dtype: Literal["float16"] = "float16"


class Shard(_Node):
    """One tar file. `bucket` is its resolution, height x width."""

    name: str
    samples: int
    bytes: int
    sha256: str
    bucket: str


class Manifest(_Node):
    """The whole of manifest.json.

    `labels` are the classes of the pictures, in the order of their numbers; empty where the pack has no labels.
    `inputs` is the sha256 of what was to be packed (source, settings, encoder); `fingerprint` of what came out (every
    shard, the index): two data sets with one fingerprint have the same samples in the same order, wherever they lie.
    """

    version: int = FORMAT_VERSION
    name: str
    inputs: str
    fingerprint: str
    num_samples: int
    image: ImageFacts
    text: TextFacts
    labels: tuple[str, ...] = ()
    shards: tuple[Shard, ...]
    index_sha256: str

    @staticmethod
    def load(url: str) -> "Manifest":
        """Read and check the manifest of the data set at `url`. Raises ManifestError, StorageError."""
        store = open_store(url)
        try:
            text = store.get(MANIFEST_NAME)
        except MissingError as error:
            raise ManifestError(f"no data set at {url}: {error}") from error
        where = store.url(MANIFEST_NAME)
        try:
            tree: Any = json.loads(text)
        except ValueError as error:
            raise ManifestError(f"{where}: not JSON: {error}") from None
        version = tree.get("version") if isinstance(tree, dict) else None
        if version != FORMAT_VERSION:
            raise ManifestError(f"{where}: format version {version!r}; this megadit reads version {FORMAT_VERSION}")
        try:
            manifest = Manifest.model_validate(tree)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            raise ManifestError(f"{where}: {'; '.join(lines)}") from None
        manifest._check(where)
        return manifest

    def load_index(self, store: Store) -> "Index":
        """Read the index and check it against the manifest. Raises ManifestError, StorageError."""
        data = store.get(INDEX_NAME)
        where = store.url(INDEX_NAME)
        if hashlib.sha256(data).hexdigest() != self.index_sha256:
            raise ManifestError(f"{where}: the index does not belong to the manifest beside it (sha256 differs)")
        index = Index.from_bytes(data)
        if len(index.keys) != self.num_samples:
            raise ManifestError(f"{where}: {len(index.keys)} samples, the manifest says {self.num_samples}")
        if (index.label is not None) != bool(self.labels):
            raise ManifestError(f"{where}: the index and the manifest beside it disagree on whether there are labels")
        return index

    def _check(self, where: str) -> None:
        if sum(shard.samples for shard in self.shards) != self.num_samples or self.num_samples < 1:
            raise ManifestError(f"{where}: its shards do not have the {self.num_samples} samples that it states")
        buckets = sorted({shard.bucket for shard in self.shards})
        if len(buckets) != 1:
            raise ManifestError(f"{where}: resolution buckets {', '.join(buckets)}; only one is supported yet")
        if self.fingerprint != compute_fingerprint(self.image, self.text, self.labels, self.shards, self.index_sha256):
            raise ManifestError(f"{where}: the fingerprint does not belong to the shards that it lists")

    def dump(self) -> bytes:
        """The bytes of manifest.json."""
        return (self.model_dump_json(indent=1, exclude=None if self.labels else {"labels"}) + "\n").encode()


def compute_fingerprint(
    image: ImageFacts, text: TextFacts, labels: tuple[str, ...], shards: tuple[Shard, ...], index_sha256: str
) -> str:
    """sha256 over all that determines the samples and their order."""
    facts = [image.model_dump(), text.model_dump(), [shard.model_dump() for shard in shards], index_sha256]
    if labels:
        facts.append(labels)
    return hashlib.sha256(json.dumps([FORMAT_VERSION, facts], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Index:
    """Where each member of each sample lies. N samples in the order of the shards; members per kind in MEMBERS.

    keys: bytes [N]; shard: int32 [N]; offset: int64, size: int32, crc32: uint32 [N] per kind; label: int32 [N], or None
    in a pack without labels, whose file has no such column.
    """

    keys: np.ndarray
    shard: np.ndarray
    offset: dict[str, np.ndarray]
    size: dict[str, np.ndarray]
    crc32: dict[str, np.ndarray]
    label: np.ndarray | None = None

    @staticmethod
    def from_bytes(data: bytes) -> "Index":
        """Read index.npz."""
        with np.load(io.BytesIO(data), allow_pickle=False) as columns:
            members = {name: {kind: columns[f"{name}.{kind}"] for kind in MEMBERS} for name in MEMBER_COLUMNS}
            label = columns.get("label")
            return Index(columns["keys"], columns["shard"], **members, label=label)

    def to_bytes(self) -> bytes:
        """Write index.npz; equal indices give equal bytes."""
        buffer = io.BytesIO()
        members = {f"{name}.{kind}": getattr(self, name)[kind] for name in MEMBER_COLUMNS for kind in MEMBERS}
        if self.label is not None:
            members["label"] = self.label
        np.savez(buffer, keys=self.keys, shard=self.shard, **members)
        return buffer.getvalue()
