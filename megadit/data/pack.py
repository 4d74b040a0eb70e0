"""Packing: captioned pictures become WebDataset shards with a manifest, once, before any training.

<destination>/train/shard-000000.tar ...   index.npz   manifest.json
<destination>/validation/...               the same: a data set of its own

A sample is `key.png` (RGB, square, lossless), `key.json` (its line of captions.jsonl), `key.text.npy` (float16 [L, D],
L the caption's true length) and `key.pooled.npy` (float16 [P]). Plain `webdataset` and tar tools read the shards. The
same inputs give the same bytes. The manifests are written last: what a broken pack leaves behind is no data set.
"""

import hashlib
import io
import json
import logging
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

from megadit.data.manifest import (
    IMAGE,
    INDEX_NAME,
    MANIFEST_NAME,
    MEMBER_COLUMNS,
    MEMBERS,
    METADATA,
    POOLED,
    TEXT,
    ImageFacts,
    Index,
    Manifest,
    Shard,
    TextFacts,
    compute_fingerprint,
)
from megadit.data.sources import CaptionedFolder, concept
from megadit.data.storage import open_store
from megadit.data.text_encoder import TextEncoder
from megadit.randomness import Purpose, generator

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "train", "validation"
RESIZE_FILTERS = {"lanczos": Image.Resampling.LANCZOS}
TAR_PREFIX_BYTES = tarfile.BLOCKSIZE  # a ustar member has one header block before its data


class PackError(ValueError):
    """Settings that cannot be packed, or a destination that has something else."""


@dataclass(frozen=True)
class Packed:
    """The two data sets at the destination; `skipped` when they were there already."""

    train: Manifest
    validation: Manifest
    skipped: bool


def pack(
    source: CaptionedFolder,
    destination: str,
    *,
    size: int,
    encoder: TextEncoder,
    seed: int = 0,
    shard_samples: int = 512,
    holdout: int = 32,
    where: Sequence[str] = (),
    label: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """Pack `source` to `destination` (s3://bucket/prefix, file:///folder or a path) as `train` and `validation`.

    size: side of the square pictures (centre crop, then Lanczos). holdout: about one concept in `holdout` goes to
    validation, chosen by a hash of the concept alone. where: conditions `field=value` on the metadata. label: the field
    of the metadata whose texts are the classes. seed: of the one shuffle. on_progress(done, total): called after each
    shard, in samples.
    Raises PackError, SourceError and StorageError; a destination that has another data set is left as it is.
    """
    for name, value, least in (("size", size, 1), ("shard_samples", shard_samples, 1), ("holdout", holdout, 2)):
        if value < least:
            raise PackError(f"{name} {value} must be at least {least}")
    image = ImageFacts(size=size)
    text = TextFacts(
        encoder=encoder.name,
        weights_sha256=encoder.weights_sha256,
        dim=encoder.dim,
        pooled_dim=encoder.pooled_dim,
        max_tokens=encoder.max_tokens,
    )
    asked = [source.digest, image.model_dump(), text.model_dump(), seed, shard_samples, holdout, sorted(where)]
    if label is not None:
        asked.append(label)
    inputs = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    found = {split: _existing(f"{destination}/{split}", inputs) for split in (TRAIN, VALIDATION)}
    train, validation = found[TRAIN], found[VALIDATION]
    if train and validation:
        log.info("%s is packed already (%d + %d samples)", destination, train.num_samples, validation.num_samples)
        return Packed(train, validation, skipped=True)

    splits = _split(source, where, seed, holdout)
    classes = _read_classes(source, [*splits[TRAIN], *splits[VALIDATION]], label)
    labels = tuple(sorted(set(classes.values())))
    total, done = sum(map(len, splits.values())), 0
    manifests: dict[str, Manifest] = {}
    for split, keys in splits.items():
        store = open_store(f"{destination}/{split}")
        columns, shards = _Columns(), []
        for number, start in enumerate(range(0, len(keys), shard_samples)):
            chosen = keys[start : start + shard_samples]
            data = _build_shard(source, chosen, number, image, encoder, columns)
            name = f"shard-{number:06d}.tar"
            store.put(name, data)
            shards.append(_describe(name, data, len(chosen), size))
            done += len(chosen)
            on_progress(done, total)
        numbers = [labels.index(classes[key]) for key in keys] if labels else None
        index = columns.to_index(numbers).to_bytes()
        store.put(INDEX_NAME, index)
        index_sha256 = hashlib.sha256(index).hexdigest()
        manifests[split] = Manifest(
            name=f"{source.name}/{split}",
            inputs=inputs,
            fingerprint=compute_fingerprint(image, text, labels, tuple(shards), index_sha256),
            num_samples=len(keys),
            image=image,
            text=text,
            labels=labels,
            shards=tuple(shards),
            index_sha256=index_sha256,
        )
    for split, manifest in manifests.items():
        open_store(f"{destination}/{split}").put(MANIFEST_NAME, manifest.dump())
    return Packed(manifests[TRAIN], manifests[VALIDATION], skipped=False)


def _existing(url: str, inputs: str) -> Manifest | None:
    """The data set at `url` if it was made from `inputs`, None if there is none. Raises PackError for another one."""
    if open_store(url).size(MANIFEST_NAME) is None:
        return None
    manifest = Manifest.load(url)
    if manifest.inputs != inputs:
        raise PackError(
            f"{url} has another data set ({manifest.name}, {manifest.num_samples} samples, size {manifest.image.size}, "
            "packed from other inputs or with other settings); choose another destination or delete it"
        )
    return manifest


def _split(source: CaptionedFolder, where: Sequence[str], seed: int, holdout: int) -> dict[str, list[str]]:
    """Shuffled keys of each split. Variants of one picture share a concept, so they never straddle the splits."""
    keys = source.select(where)
    splits: dict[str, list[str]] = {TRAIN: [], VALIDATION: []}
    for place in generator(seed, Purpose.PACKING).permutation(len(keys)):
        key = keys[place]
        digest = hashlib.sha256(concept(source.metadata[key]).encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % holdout == 0
        splits[VALIDATION if held_out else TRAIN].append(key)
    for split, chosen in splits.items():
        if not chosen:
            raise PackError(f"{len(keys)} pictures with holdout 1 in {holdout} leave {split} empty; change holdout")
    return splits


def _read_classes(source: CaptionedFolder, keys: Sequence[str], label: str | None) -> dict[str, str]:
    """The class of each picture, by key: a text in the field `label` of its metadata; empty without a label."""
    if label is None:
        return {}
    classes = {}
    for key in keys:
        record = source.metadata[key]
        if not isinstance(record.get(label), str):
            known = ", ".join(field for field, value in record.items() if isinstance(value, str))
            raise PackError(f"label {label!r}: the picture {key!r} has no text in that field; it has one in {known}")
        classes[key] = record[label]
    return classes


@dataclass
class _Columns:
    """The index while it grows."""

    keys: list[str] = field(default_factory=list)
    shard: list[int] = field(default_factory=list)
    members: dict[str, dict[str, list[int]]] = field(
        default_factory=lambda: {name: {kind: [] for kind in MEMBERS} for name in MEMBER_COLUMNS}
    )

    def add_member(self, kind: str, offset: int, data: bytes) -> None:
        for name, value in (("offset", offset), ("size", len(data)), ("crc32", zlib.crc32(data))):
            self.members[name][kind].append(value)

    def to_index(self, labels: Sequence[int] | None) -> Index:
        members = {
            name: {kind: np.array(values, dtype=MEMBER_COLUMNS[name]) for kind, values in kinds.items()}
            for name, kinds in self.members.items()
        }
        label = None if labels is None else np.array(labels, dtype=np.int32)
        return Index(np.array(self.keys, dtype=np.bytes_), np.array(self.shard, dtype=np.int32), **members, label=label)


def _build_shard(
    source: CaptionedFolder,
    keys: Sequence[str],
    number: int,
    image: ImageFacts,
    encoder: TextEncoder,
    columns: _Columns,
) -> bytes:
    """One tar file, its members entered into `columns`."""
    features = encoder.encode([source.metadata[key]["caption"] for key in keys])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, caption in zip(keys, features, strict=True):
            members = {
                IMAGE: _encode_image(source.image(key), image),
                METADATA: json.dumps(source.metadata[key], sort_keys=True, ensure_ascii=False).encode(),
                TEXT: _encode_array(caption.tokens.numpy(), key),
                POOLED: _encode_array(caption.pooled.numpy(), key),
            }
            columns.keys.append(key)
            columns.shard.append(number)
            for kind in MEMBERS:
                info = tarfile.TarInfo(f"{key}.{kind}")  # time, owner and mode keep their constant defaults
                info.size = len(members[kind])
                columns.add_member(kind, tar.offset + TAR_PREFIX_BYTES, members[kind])
                tar.addfile(info, io.BytesIO(members[kind]))
    return buffer.getvalue()


def _encode_image(picture: Image.Image, facts: ImageFacts) -> bytes:
    square = ImageOps.fit(picture, (facts.size, facts.size), RESIZE_FILTERS[facts.resize])
    buffer = io.BytesIO()
    square.save(buffer, format="PNG")
    return buffer.getvalue()


def _encode_array(values: np.ndarray, key: str) -> bytes:
    halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise PackError(f"the text features of {key!r} do not fit into float16")
    buffer = io.BytesIO()
    np.save(buffer, halves, allow_pickle=False)
    return buffer.getvalue()


def _describe(name: str, data: bytes, samples: int, size: int) -> Shard:
    digest = hashlib.sha256(data).hexdigest()
    return Shard(name=name, samples=samples, bytes=len(data), sha256=digest, bucket=f"{size}x{size}")
