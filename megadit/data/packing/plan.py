"""Which samples go into which shard, in which order: known before the first picture is read."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.format.buckets import assign, bucket_table
from megadit.data.packing.settings import PackError, PackSettings
from megadit.data.packing.source import Source, concept
from megadit.randomness import Purpose, generator

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be made: `samples` int64 [N] of the source, in order, at `bucket` height x width."""

    split: str
    name: str
    bucket: tuple[int, int]
    samples: np.ndarray

    def digest(self, inputs: str) -> str:
        """What a shard must have been made from to be this one; `inputs` is the manifest's."""
        facts = json.dumps([inputs, self.split, self.name, self.bucket])
        return hashlib.sha256(facts.encode() + self.samples.astype("<i8").tobytes()).hexdigest()


def plan_shards(source: Source, settings: PackSettings, autoencoder: Autoencoder | None) -> list[ShardPlan]:
    """The shards of all splits. Raises PackError, SourceError, StorageError.

    A split is shuffled, unless its source is to be read in order; then it is divided into buckets, and these into
    shards. The last shard of a bucket may be smaller.
    """
    table = bucket_table(settings.size) if settings.aspect_buckets else [(settings.size, settings.size)]
    _check_downsampling(table, autoencoder)
    plans = []
    for split, samples in _split(source, settings).items():
        place_N = assign(source.sizes(samples), table) if len(table) > 1 else np.zeros(len(samples), dtype=np.int64)
        number = 0
        for place, bucket in enumerate(table):
            ours = samples[place_N == place]
            for start in range(0, len(ours), settings.shard_samples):
                chosen = ours[start : start + settings.shard_samples]
                plans.append(ShardPlan(split, f"shard-{number:06d}.tar", bucket, chosen))
                number += 1
    return plans


def _split(source: Source, settings: PackSettings) -> dict[str, np.ndarray]:
    """The samples of each split. Variants of one picture share a concept, so they never straddle the splits."""
    samples = source.select(settings.where)
    if not source.in_order:
        samples = samples[generator(settings.seed, Purpose.PACKING).permutation(len(samples))]
    if not settings.holdout:
        return {TRAIN: samples}
    held_out = np.array([_is_held_out(source.key(number), settings.holdout) for number in samples.tolist()])
    splits = {TRAIN: samples[~held_out], VALIDATION: samples[held_out]}
    for split, chosen in splits.items():
        if not len(chosen):
            raise PackError(
                f"{len(samples)} pictures with holdout 1 in {settings.holdout} leave {split} empty; change holdout"
            )
    return splits


def _is_held_out(key: str, holdout: int) -> bool:
    digest = hashlib.sha256(concept(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") % holdout == 0


def _check_downsampling(table: list[tuple[int, int]], autoencoder: Autoencoder | None) -> None:
    if autoencoder is None:
        return
    for height, width in table:
        if height % autoencoder.downsampling or width % autoencoder.downsampling:
            raise PackError(
                f"autoencoder {autoencoder.name}: {height}x{width} pixels are not a multiple of its downsampling "
                f"{autoencoder.downsampling}; choose another size"
            )
