"""What a trial's curve says: its value, and whether it diverged. Both are functions of RUN/metrics.jsonl alone."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megadit.recipe import Recipe

Metric = Literal["training", "validation"]


@dataclass(frozen=True)
class Curve:
    """The losses of a run so far: one for each step, and the last validation loss of the raw weights."""

    losses: list[float]
    validation_loss: float | None

    @staticmethod
    def read(run: Path) -> "Curve":
        """Read the curve of a run that logs each step; a line that is still being written is left out."""
        path = run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        validation = [line["loss"] for line in lines if line["kind"] == "validation" and line["weights"] == "raw"]
        return Curve(
            losses=[line["loss"] for line in lines if line["kind"] == "train"],
            validation_loss=validation[-1] if validation else None,
        )

    def value(self, recipe: Recipe, metric: Metric) -> float | None:
        """What a sweep minimises; None while the run is unfinished.

        `training`: the mean loss over the last fifth of the steps. Trials of one seed see the same samples, noise and
        timesteps in the same order, so their values are paired. `validation`: the last validation loss.
        """
        if len(self.losses) < recipe.num_steps:
            return None
        if metric == "validation":
            return self.validation_loss
        last = self.losses[-math.ceil(recipe.num_steps / 5) :]
        return math.fsum(last) / len(last)


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
