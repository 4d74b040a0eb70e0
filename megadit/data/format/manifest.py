"""What a data set says about itself: `manifest.json`, beside its index and its shards or naming where these lie.

The manifest is written last, so a folder without one is not a data set, and one with one is whole. The index (see
index.py) has the place and the CRC-32 of every member of every shard, so a sample is one Range GET away.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megadit.data.format.index import Index
from megadit.data.storage import MissingError, Store, open_store

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"

# Kinds of members: what follows the key and a dot in a tar. Pictures have that of their format.
METADATA, CAPTION = "json", "txt"
LATENT, TEXT, TEXT_SCALE, POOLED = "latent.npy", "text.npy", "text_scale.npy", "pooled.npy"
FEATURES, FEATURES_SCALE = "features.npy", "features_scale.npy"


class ManifestError(ValueError):
    """A data set that is missing, unknown, or not what it says. One line."""


class _Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageFacts(_Node):
    """Pictures: RGB, the member `member` of each sample.

    `resize` names the filter that packing resized them with, once, to their shard's bucket; None where they are as they
    were found, each of its own size.
    """

    member: str = "png"
    channels: int = 3
    resize: str | None = None


class LatentFacts(_Node):
    """Latents of a frozen autoencoder: `latent.npy`, [channels, H, W], or mean and std one after the other, [2, ...].

    H and W are the pixels of the bucket over `downsampling`. The model sees (latent - shift_factor) * scaling_factor.
    bfloat16 is stored as the uint16 of its bits, which numpy lacks.
    """

    encoder: str
    weights_sha256: str
    channels: int = Field(ge=1)
    downsampling: int = Field(ge=1)
    moments: bool
    scaling_factor: float
    shift_factor: float
    dtype: Literal["float16", "bfloat16"] = "float16"


class TextFacts(_Node):
    """Text features: tokens [L, dim] with L <= max_tokens, the caption's true length; pooled float16 [pooled_dim].

    int8 tokens are multiplied by a scale for each token, `text_scale.npy`, float16 [L].
    """

    encoder: str
    weights_sha256: str
    dim: int
    pooled_dim: int
    max_tokens: int
    dtype: Literal["float16", "int8"] = "float16"


class FeatureFacts(_Node):
    """Features of the pictures by a frozen image encoder: [grid * grid, dim], patches in the order of rows.

    bfloat16 is stored as that of latents; int8 is multiplied by a scale for each patch, `features_scale.npy`, float16
    [grid * grid].
    """

    encoder: str
    weights_sha256: str
    dim: int = Field(ge=1)
    grid: int = Field(ge=1)
    dtype: Literal["bfloat16", "int8"] = "bfloat16"


class ShardFacts(_Node):
    """One tar file. `bucket` is the resolution of its pictures, height x width; None where they differ.

    name: below the data set, or below its `root`; captions: the file, below the data set, that has the `txt` members
    where they are not in the tar; sha256, etag: of the whole tar, where known. The stream asks for it by its ETag.
    """

    name: str
    num_samples: int
    num_bytes: int
    bucket: str | None = None
    sha256: str | None = None
    etag: str | None = None
    captions: str | None = None


class Manifest(_Node):
    """The whole of manifest.json.

    `members` are the kinds of members that each sample has, in the order of its tar. `root` is where the shards lie
    that were there before (SA-1B's); without it they lie beside the manifest. `labels` are the classes of the pictures,
    in the order of their numbers. `left_out` counts samples that are not in the data set, by reason. `index` has the
    sha256 of each column. `inputs` is the sha256 of what was to be packed (source, settings, encoders); `fingerprint`
    of what came out: two data sets with one fingerprint have the same samples in the same order, wherever they lie.
    """

    version: int = FORMAT_VERSION
    name: str
    inputs: str
    fingerprint: str = ""
    num_samples: int
    members: tuple[str, ...]
    root: str | None = None
    image: ImageFacts | None = None
    latent: LatentFacts | None = None
    text: TextFacts | None = None
    features: FeatureFacts | None = None
    labels: tuple[str, ...] = ()
    left_out: dict[str, int] = {}
    shards: tuple[ShardFacts, ...]
    index: dict[str, str]

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

    def load_index(self, store: Store) -> Index:
        """Map the index and check it against the manifest. Raises ManifestError, StorageError."""
        index = Index.read(store, self.index)
        wrong = sorted(name for name, column in index.columns().items() if len(column) != self.num_samples)
        if wrong:
            raise ManifestError(f"{store.url()}: the index does not have {self.num_samples} samples in {wrong[0]}")
        if set(index.places) != set(self.members):
            raise ManifestError(
                f"{store.url()}: the index has {', '.join(index.places)}, not {', '.join(self.members)}"
            )
        return index

    def buckets(self) -> tuple[str, ...]:
        """The resolutions of its shards, height x width, sorted; empty where pictures are as they were found."""
        return tuple(sorted({shard.bucket for shard in self.shards if shard.bucket}, key=parse_bucket))

    def sealed(self) -> "Manifest":
        """The same with its fingerprint, which leaves out where things lie and what they are called."""
        facts = self.model_dump(mode="json", exclude={"name", "inputs", "fingerprint", "root", "left_out"})
        if self.features is None:  # as it was before there were any
            del facts["features"]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.model_copy(update={"fingerprint": digest})

    def dump(self) -> bytes:
        """The bytes of manifest.json."""
        return (self.model_dump_json(indent=1, exclude_none=True) + "\n").encode()

    def _check(self, where: str) -> None:
        if sum(shard.num_samples for shard in self.shards) != self.num_samples or self.num_samples < 1:
            raise ManifestError(f"{where}: its shards do not have the {self.num_samples} samples that it states")
        if len({shard.bucket is None for shard in self.shards}) != 1:
            raise ManifestError(f"{where}: some shards have a resolution bucket and some have none")
        if self.fingerprint != self.sealed().fingerprint:
            raise ManifestError(f"{where}: the fingerprint does not belong to the shards that it lists")


def parse_bucket(bucket: str) -> tuple[int, int]:
    """Height and width in pixels of "256x384"."""
    height, width = bucket.split("x")
    return int(height), int(width)
