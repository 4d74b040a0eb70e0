"""From a folder of generated images to its scores on disk, on one rank or several.

Features come first, shared over the ranks and kept in FOLDER/features; numbers are then computed by rank 0 from all of
them in the order of the pictures. So a score is the same on any number of ranks, interrupted or not.
"""

import json
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.checksums import sha256_of
from megadit.distributed import Topology
from megadit.eval.features import FeatureFiles, FeatureSettings, Pictures, extract
from megadit.eval.geneval.judging import PROTOCOLS, score_geneval
from megadit.eval.metrics.catalogue import Compares, Metric, Value, find
from megadit.eval.metrics.frechet import Moments, Statistics, frechet, frechet_stderr, load_statistics, save_statistics
from megadit.eval.picture_sets import Generated, fingerprint, open_reference
from megadit.eval.weights import Located
from megadit.files import write_text

logger = logging.getLogger(__name__)

Score = dict[str, Any]
"""What is stored: metric, version, value, stderr, n, higher_is_better, weights, settings, groups, rows."""


def score_folder(
    metric: str,
    folder: Path,
    weights: Path,
    reference: Path | None,
    resize: str | None,
    batch_size: int,
    topology: Topology,
    reference_features: Path | None = None,
) -> list[Score]:
    """The scores of a metric by its name, on every rank; call it on all ranks. Raises ValueError as the metrics do."""
    if metric not in PROTOCOLS:
        settings = FeatureSettings(batch_size, topology, reference_features)
        return score_metric(find(metric, resize), folder, weights, reference, settings)
    if reference is not None or resize is not None:
        raise ValueError(f"{metric} takes neither --reference nor --resize: it judges images by their prompts")
    return [score_geneval(folder, weights, metric, topology)]


def score_metric(
    metric: Metric,
    folder: Path,
    weights: Path,
    reference: Path | None,
    settings: FeatureSettings,
) -> list[Score]:
    """Score the images of `folder` and write scores/<id>.json ("/" in the id becomes "_"); the scores, on every rank.

    Call it on all ranks of a process group. `weights` is the folder of weights files; `reference` a folder of images or
    an .npz, for metrics that compare with one. Raises ValueError where the folder is incomplete, where weights are
    missing or others, for images that cannot be scored and for a reference that does not fit.
    """
    if reference is None and metric.compares in (Compares.PICTURES, Compares.STATISTICS):
        raise ValueError(f"{metric.name} compares with {metric.compares.value}: give --reference")
    if reference is not None and metric.compares in (Compares.NOTHING, Compares.PROMPTS):
        raise ValueError(f"{metric.name} compares with {metric.compares.value}: it takes no --reference")
    located = settings.topology.on_first(lambda: metric.features.weights.locate(weights))
    ours = settings.topology.on_first(lambda: Generated(folder))
    job = _Job(metric, located, folder, settings)
    theirs = settings.topology.on_first(lambda: _open_reference(job, reference))
    job.extract(ours)
    if theirs is not None:
        job.extract(theirs)
    return settings.topology.on_first(lambda: _write(job, ours, _compute(job, ours, theirs, reference)))


@dataclass(frozen=True)
class _Job:
    metric: Metric
    located: Located
    folder: Path
    settings: FeatureSettings

    def store_folder(self, pictures: Pictures) -> Path:
        """Where the features of a set of pictures under these weights are kept."""
        name = f"{_flat(self.metric.features.name)}-{self.located.digest()}"
        ours = self.folder / "features"
        if pictures.name == str(self.folder):
            return ours / name / "generated"
        return (self.settings.reference_folder or ours) / name / f"reference-{fingerprint(pictures)}"

    def extract(self, pictures: Pictures) -> None:
        extract(self.metric.features, self.located, pictures, self.store_folder(pictures), self.settings)

    def load(self, pictures: Pictures) -> Tensor:
        """The metric's columns, float32 [N, D]."""
        return FeatureFiles(self.metric.features, self.store_folder(pictures)).load(pictures, self.metric.columns)

    def judge(self) -> str:
        """The feature set and its weights: what statistics must be of."""
        return f"{self.metric.features.name} {self.located.digest()}"

    def load_statistics(self, path: Path) -> Statistics:
        dim = len(range(self.metric.features.width)[self.metric.columns])
        return load_statistics(path, self.judge(), self.metric.statistics_suffix, dim)


@dataclass(frozen=True)
class _Result:
    value: Value
    groups: dict[str, float]
    rows: list[dict[str, Any]] | None = None


def _open_reference(job: _Job, reference: Path | None) -> Pictures | None:
    """The reference's pictures, or None where a file has the statistics that are wanted, which is checked."""
    if reference is None:
        return None
    if job.metric.compares is Compares.STATISTICS and reference.suffix == ".npz":
        job.load_statistics(reference)  # an error now, not after hours of features
        return None
    return open_reference(reference)


def _compute(job: _Job, ours: Generated, theirs: Pictures | None, reference: Path | None) -> list[_Result]:
    metric = job.metric
    features = job.load(ours)
    if metric.compares is Compares.STATISTICS:
        assert reference is not None
        return [_frechet(job, features, ours, theirs, reference)]
    if metric.compares is Compares.PROMPTS:
        return [_mean_over_images(metric, features[:, 0].tolist(), ours)]
    assert metric.compute is not None
    sets = [features] if theirs is None else [features, job.load(theirs)]
    values = metric.compute(*sets)
    described = {} if theirs is None else {"reference": _describe(theirs)}
    return [_Result(replace(value, settings={**value.settings, **described}), {}) for value in values]


def _frechet(job: _Job, features: Tensor, ours: Generated, theirs: Pictures | None, reference: Path) -> _Result:
    metric, suffix = job.metric, job.metric.statistics_suffix
    kept, name = job.folder / "statistics", _flat(metric.features.name) + suffix
    groups: dict[str, float] = {}
    if theirs is None:  # before ours are saved: it may be the file that they replace
        their_statistics = job.load_statistics(reference)
        described = {"name": str(reference), "sha256": sha256_of(reference), "n": their_statistics.num}
    else:
        their_features = job.load(theirs)
        their_statistics = Moments.of(their_features).statistics()
        path = kept / f"{name}-reference-{fingerprint(theirs)}.npz"
        save_statistics(path, their_statistics, job.judge(), suffix)
        logger.info("%s: the reference's statistics are kept in %s, which --reference takes, too", metric.name, path)
        described = _describe(theirs)
        groups = _frechet_by_group(features, ours.groups, their_features, theirs.groups)
    our_statistics = Moments.of(features).statistics()
    save_statistics(kept / f"{name}.npz", our_statistics, job.judge(), suffix)
    distance = frechet(our_statistics, their_statistics)
    stderr = frechet_stderr(features, our_statistics, their_statistics, distance.transport_DD)
    return _Result(Value(metric.id, distance.value, stderr, False, {"reference": described}), groups)


def _frechet_by_group(
    features: Tensor, our_groups: Sequence[str], reference_features: Tensor, their_groups: Sequence[str]
) -> dict[str, float]:
    """The distance within each category that both sets have two images of; none where either has no categories."""
    distances = {}
    for group in sorted({*our_groups} & {*their_groups} - {""}):
        pair: list[Statistics] = []
        for rows, groups in ((features, our_groups), (reference_features, their_groups)):
            moments = Moments.of(rows[torch.tensor([found == group for found in groups])])
            if moments.num > 1:
                pair.append(moments.statistics())
        if len(pair) == 2:
            distances[group] = frechet(*pair).value
    return distances


def _mean_over_images(metric: Metric, values: Sequence[float], ours: Generated) -> _Result:
    """The mean over images. Images of one prompt are alike, so the standard error is that of the means of prompts."""
    by_prompt: dict[int, list[float]] = defaultdict(list)
    by_group: dict[str, list[float]] = defaultdict(list)
    rows = []
    for unit, group, value in zip(ours.units, ours.groups, values, strict=True):
        by_prompt[unit.prompt].append(value)
        by_group[group].append(value)
        rows.append({"prompt": unit.prompt, "image": unit.image, "value": value})
    means = [statistics.fmean(found) for found in by_prompt.values()]
    stderr = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
    groups = {group: statistics.fmean(found) for group, found in sorted(by_group.items()) if group}
    return _Result(Value(metric.id, statistics.fmean(values), stderr, True), groups, rows)


def _describe(pictures: Pictures) -> dict[str, Any]:
    return {"name": pictures.name, "pictures": fingerprint(pictures), "n": len(pictures.digests)}


def _write(job: _Job, ours: Generated, results: list[_Result]) -> list[Score]:
    folder = job.folder / "scores"
    if repeated := len(ours.digests) - len(set(ours.digests)):
        logger.warning("%s: %d images are copies of others, byte by byte", job.folder, repeated)
    scores = []
    for result in results:
        value, name = result.value, _flat(result.value.id)
        assert all(map(math.isfinite, [value.value, *result.groups.values()])), f"{value.id} of {job.folder}: {result}"
        if result.rows is not None:
            write_text(folder / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in result.rows))
        found = {
            "metric": value.id,
            "version": job.metric.version,
            "value": value.value,
            "stderr": value.stderr,
            "n": len(ours.digests),
            "higher_is_better": value.higher_is_better,
            "weights": job.located.sha256,
            "settings": {
                "features": job.metric.features.name,
                "batch_size": job.settings.batch_size,
                "pictures": fingerprint(ours),
                "num_copies": repeated,
                **value.settings,
            },
            "groups": result.groups,
            "rows": f"{name}.jsonl" if result.rows is not None else None,
        }
        write_text(folder / f"{name}.json", json.dumps(found, indent=2))
        scores.append(found)
    return scores


def _flat(name: str) -> str:
    return name.replace("/", "_")
