"""Packing: captioned pictures become WebDataset shards with a manifest, once, before any training.

<destination>/train/shard-000000.tar ...   shards/...   index/...   manifest.json
<destination>/validation/...               the same: a data set of its own
<destination>/pack.json                    what all this is made from: another pack does not begin here (destination.py)

A sample is `key.png` or `key.jpg` (RGB, at its shard's bucket), `key.json` (its metadata, where the source has some),
`key.txt` (its caption), `key.latent.npy`, `key.text.npy` (the caption's true length), `key.text_scale.npy`,
`key.pooled.npy`, `key.features.npy` and `key.features_scale.npy`, as far as they are asked for (see Encoding). Plain
`webdataset` and tar tools read the shards.

Every shard is planned in advance and made by one rank, with no word between ranks: each looks at what is there, and the
one that finds all shards made writes the index and the manifests. The same inputs give the same bytes, whatever the
number of ranks and however often they were stopped. What a broken pack leaves behind is no data set.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadit.data.bars import Bars, Tally, no_bars
from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.format.index import PLACE, Index
from megadit.data.format.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from megadit.data.packing.destination import claim, remove_temporaries
from megadit.data.packing.encoding import Encoding
from megadit.data.packing.plan import TRAIN, VALIDATION, ShardPlan, plan_shards
from megadit.data.packing.settings import PackError, PackSettings
from megadit.data.packing.shard import ShardRecord, build_shard, read_record, record_name, write_shard
from megadit.data.packing.source import Source
from megadit.data.storage import Store, open_store
from megadit.objectives.image_encoder import ImageEncoder

log = logging.getLogger(__name__)

MAX_BROKEN_SHARE = 0.001  # of the pictures: so many may be left out because they cannot be decoded
BROKEN = "picture cannot be decoded"


@dataclass(frozen=True)
class Packed:
    """The data sets at the destination; `skipped` when they were there already. validation: None with holdout 0."""

    train: Manifest
    validation: Manifest | None
    skipped: bool

    @property
    def counts(self) -> str:
        """How many samples there are, in words."""
        held_out = self.validation.num_samples if self.validation else 0
        return f"{self.train.num_samples} training and {held_out} validation samples"


def pack(
    source: Source,
    destination: str,
    settings: PackSettings,
    text_encoder: TextEncoder | None = None,
    autoencoder: Autoencoder | None = None,
    image_encoder: ImageEncoder | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    bars: Bars = no_bars,
) -> Packed | None:
    """Pack `source` to `destination` (s3://bucket/prefix, file:///folder or a path) as `train` and `validation`.

    This rank makes every `world_size`-th shard. None is returned where shards of other ranks are still missing; the
    rank that finishes last, or the next pack with the same arguments, writes the manifests.
    Raises PackError, SourceError and StorageError; a destination that has another data set, or part of one, is left as
    it is.
    """
    encoding = Encoding(source, settings, text_encoder, autoencoder, image_encoder)
    splits = (TRAIN, VALIDATION) if settings.holdout else (TRAIN,)
    stores = {split: open_store(f"{destination}/{split}") for split in splits}
    job = _Job(source, settings, encoding, _inputs(source, settings, encoding), stores)
    found = [_existing(f"{destination}/{split}", job.inputs) for split in splits]
    if all(found):
        packed = _to_packed(dict(zip(splits, found, strict=True)), skipped=True)
        log.info("%s is packed already (%s)", destination, packed.counts)
        return packed

    plans = plan_shards(source, settings, autoencoder)
    classes = _Classes.read(source, plans, settings.label)
    both = [open_store(f"{destination}/{split}") for split in (TRAIN, VALIDATION)]  # another pack may have made either
    claim(open_store(destination), both, _asked(source, settings, encoding))
    job.make(plans[rank::world_size], _most_broken(plans), bars)
    records = job.records(plans)
    if records is None:
        log.info("rank %d of %d has made its shards; some of others are not there yet", rank, world_size)
        return None
    _check_broken([key for record in records for key in record.broken], _most_broken(plans), source)
    manifests = {
        split: job.write_index(
            split, [record for plan, record in zip(plans, records, strict=True) if plan.split == split], classes
        )
        for split in splits
    }
    for split, manifest in manifests.items():
        names = [plan.name for plan in plans if plan.split == split]
        remove_temporaries(job.stores[split], {*names, *map(record_name, names)})
        job.stores[split].put(MANIFEST_NAME, manifest.dump())
    return _to_packed(manifests, skipped=False)


def _to_packed(manifests: Mapping[str, Manifest | None], skipped: bool) -> Packed:
    train = manifests[TRAIN]
    assert train is not None
    return Packed(train, manifests.get(VALIDATION), skipped)


@dataclass(frozen=True)
class _Job:
    """What all shards of a pack have in common; `inputs` is the manifest's."""

    source: Source
    settings: PackSettings
    encoding: Encoding
    inputs: str
    stores: dict[str, Store]

    def make(self, plans: Sequence[ShardPlan], most_broken: int, bars: Bars) -> None:
        """Make the shards that are not there yet."""
        broken: list[str] = []
        with bars("packing") as advance:
            tally = Tally(advance, sum(len(plan.samples) for plan in plans))
            for plan in plans:
                store = self.stores[plan.split]
                record = read_record(store, plan, self.inputs)
                if record is None:
                    tar_bytes, record = build_shard(self.source, plan, self.encoding, self.inputs)
                    broken += record.broken
                    _check_broken(broken, most_broken, self.source)
                    write_shard(store, tar_bytes, record)
                tally.add(len(plan.samples))

    def records(self, plans: Sequence[ShardPlan]) -> list[ShardRecord] | None:
        """What is in the shards; None where one is missing."""
        records: list[ShardRecord] = []
        for plan in plans:
            record = read_record(self.stores[plan.split], plan, self.inputs)
            if record is None:
                return None
            records.append(record)
        return records

    def write_index(self, split: str, records: Sequence[ShardRecord], classes: "_Classes") -> Manifest:
        """Write the index of a split; its manifest."""
        samples = np.array([number for record in records for number in record.samples], dtype=np.int64)
        if not len(samples):
            raise PackError(f"none of the pictures of {split} can be decoded")
        places = {
            kind: np.concatenate([np.array(list(record.places[kind]), dtype=PLACE) for record in records])
            for kind in self.encoding.members
        }
        keys = np.array([key for record in records for key in record.keys], dtype=np.bytes_)
        index = Index(keys, places, labels=classes.of(samples))
        num_broken = sum(len(record.broken) for record in records)
        return Manifest(
            version=FORMAT_VERSION,
            name=f"{self.source.name}/{split}",
            inputs=self.inputs,
            num_samples=len(samples),
            members=self.encoding.members,
            image=self.encoding.image,
            latent=self.encoding.latent,
            text=self.encoding.text,
            features=self.encoding.features,
            labels=classes.labels,
            left_out={BROKEN: num_broken} if num_broken else {},
            shards=tuple(record.shard for record in records if record.shard.num_samples),
            index=index.write(self.stores[split]),
        ).sealed()


@dataclass(frozen=True)
class _Classes:
    """The classes of the samples `numbers`, int64 [N], sorted: places int32 [N] in `labels`; None without classes."""

    labels: tuple[str, ...]
    numbers: np.ndarray
    places: np.ndarray | None

    @staticmethod
    def read(source: Source, plans: Sequence[ShardPlan], label: str | None) -> "_Classes":
        numbers = np.sort(np.concatenate([plan.samples for plan in plans]))
        labels, places = source.classes(numbers, label)
        return _Classes(labels, numbers, places)

    def of(self, samples: np.ndarray) -> np.ndarray | None:
        return None if self.places is None else self.places[np.searchsorted(self.numbers, samples)]


def _asked(source: Source, settings: PackSettings, encoding: Encoding) -> dict[str, Any]:
    """What the inputs are the sha256 of, for those who read it."""
    facts = {"image": encoding.image, "latent": encoding.latent, "text": encoding.text, "features": encoding.features}
    stated = {name: fact.model_dump() for name, fact in facts.items() if fact}
    flat = {f"{name}.{key}": value for name, fact in stated.items() for key, value in fact.items()}
    return {"source": source.digest, **settings.facts(), **flat}


def _inputs(source: Source, settings: PackSettings, encoding: Encoding) -> str:
    facts = [fact.model_dump() if fact else None for fact in (encoding.image, encoding.latent, encoding.text)]
    if encoding.features:  # without them it is what it was before there were any
        facts.append(encoding.features.model_dump())
    asked = [source.digest, settings.facts(), *facts]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _existing(url: str, inputs: str) -> Manifest | None:
    """The data set at `url` if it was made from `inputs`, None if there is none. Raises PackError for another one."""
    if open_store(url).size(MANIFEST_NAME) is None:
        return None
    manifest = Manifest.load(url)
    if manifest.inputs != inputs:
        raise PackError(
            f"{url} has another data set ({manifest.name}, {manifest.num_samples} samples, "
            f"{', '.join(manifest.buckets())}, packed from other inputs or with other settings); "
            "choose another destination or delete it"
        )
    return manifest


def _most_broken(plans: Sequence[ShardPlan]) -> int:
    return int(MAX_BROKEN_SHARE * sum(len(plan.samples) for plan in plans))


def _check_broken(broken: Sequence[str], most: int, source: Source) -> None:
    if len(broken) > most:
        raise PackError(
            f"{source.name}: {len(broken)} pictures cannot be decoded ({', '.join(broken[:5])}"
            f"{', ...' if len(broken) > 5 else ''}); at most {most} may be left out ({MAX_BROKEN_SHARE:.1%} of all)"
        )
