"""What a trial's curve says: its value, and whether it diverged. Both are functions of RUN/metrics.jsonl alone.

A value is of a metric: `training/NAME` or `validation/NAME`, where NAME is one of the objective's metrics, or `loss`,
the weighted sum that training minimises: under other weights it is another number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.journal import read_file
from megadit.recipe import Recipe

WHERE, LOSS = ("training", "validation"), "loss"


def full_name(metric: str, recipe: Recipe) -> str:
    """`training` and `validation` are of the objective's first metric. Raises ValueError for one that is not there."""
    objective = recipe.objective
    full = f"{metric}/{objective.metrics[0]}" if metric in WHERE else metric
    possible = [f"{where}/{name}" for where in WHERE for name in (*objective.metrics, LOSS)]
    if full not in possible:
        raise ValueError(f"no metric {metric!r}: objective.kind {objective.kind} has {', '.join(possible)}")
    if full.startswith("validation") and recipe.validation is None:
        raise ValueError(f"the metric {metric} needs a recipe with a validation section")
    return full


@dataclass(frozen=True)
class Curve:
    """The numbers of a run so far, by metric: of each step, and of the last validation of the raw weights."""

    training: list[Mapping[str, Any]]
    validation: Mapping[str, Any] | None

    @property
    def losses(self) -> list[float]:
        """The weighted sum at each step."""
        return [line[LOSS] for line in self.training]

    @staticmethod
    def read(run: Path) -> "Curve":
        """Read the curve of a run that logs each step; a line that is still being written is left out."""
        path = run / "metrics.jsonl"
        lines = read_file(path) if path.exists() else []
        validation = [line for line in lines if line["kind"] == "validation" and line["weights"] == "raw"]
        return Curve(
            training=[line for line in lines if line["kind"] == "train"],
            validation=_by_name(validation[-1]) if validation else None,
        )

    def value(self, recipe: Recipe, metric: str) -> float | None:
        """What a sweep minimises, of a metric by its full name; None while the run is unfinished.

        `training`: the mean over the last fifth of the steps. Trials of one seed see the same samples, noise and
        timesteps in the same order, so their values are paired. `validation`: that of the last one.
        """
        if len(self.training) < recipe.num_steps:
            return None
        where, name = metric.split("/")
        if where == "validation":
            return None if self.validation is None else float(self.validation[name])
        last = [line[name] for line in self.training[-math.ceil(recipe.num_steps / 5) :]]
        return math.fsum(last) / len(last)


def _by_name(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The numbers of a validation line, whose `loss` is that of the metric that it states."""
    if "metric" not in line:  # written before metrics had names: the weighted sum
        return line
    return {**line, line["metric"]: line["loss"], LOSS: line["total"]}


@dataclass(frozen=True)
class Divergence:
    """After how many steps a run was found to diverge, and by what."""

    step: int
    reason: str


def find_divergence(losses: list[float], recipe: Recipe) -> Divergence | None:
    """The first step at which the mean loss of the last twentieth of the run's steps (at least 5) is over 1.5 times
    that of the first step, or a loss is not finite.

    The first tenth of the run and its warm-up do not count: there a curve may leap up and come back. The answer for a
    whole curve is the one that was found while it grew, if any.
    """
    for number, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            return Divergence(number, f"the loss is {loss}")
    window = max(5, math.ceil(recipe.num_steps / 20))
    start = max(recipe.optimizer.warmup_steps, recipe.num_steps // 10)
    for end in range(start + window, len(losses) + 1):
        mean = math.fsum(losses[end - window : end]) / window
        if mean > 1.5 * losses[0]:
            return Divergence(end, f"the loss is {mean:.3g} over {window} steps, {losses[0]:.3g} at the first")
    return None
