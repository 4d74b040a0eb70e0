"""Steps that were skipped because a loss or a gradient was not finite: counted, and ended where they cannot help.

Skipping a step helps against a sample that is broken and against a spike. It does not help when it goes on, nor when
the weights themselves are not finite: then the run stops, with a file that says what was not finite.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from megadit.batch import Batch
from megadit.engines.base import Engine, StepResult
from megadit.files import write_text


class SkippedSteps:
    """Counts skipped steps, `total` of them and those `in_a_row`. Its methods are called by all ranks together."""

    def __init__(self, run: Path, engine: Engine, allowed_in_a_row: int) -> None:
        self._run = run
        self._shards, self._topology = engine.shards, engine.topology
        self._allowed = allowed_in_a_row
        self._streak: list[dict[str, Any]] = []
        self.total = 0

    @property
    def in_a_row(self) -> int:
        return len(self._streak)

    def taken(self) -> None:
        """A step was not skipped."""
        self._streak.clear()

    def skipped(self, step: int, images_seen: int, batch: Batch, result: StepResult) -> None:
        """Step `step` was skipped, before which `images_seen` were.

        Raises ValueError, after writing RUN/not-finite-STEP.json, when a weight is not finite or when this is the last
        of the steps in a row that may be skipped.
        """
        self.total += 1
        samples = zip(batch.epoch.tolist(), batch.sample.tolist(), result.losses.total_B.tolist(), strict=True)
        per_rank = self._topology.on_every(lambda: list(samples))
        self._streak.append(
            {
                "step": step,
                "grad_norm": _number(result.grad_norm),
                "samples": [
                    {"epoch": epoch, "sample": sample, "loss": _number(loss)}
                    for part in per_rank
                    for epoch, sample, loss in part
                ],
            }
        )
        weights = self._not_finite_weights()
        if not weights and self.in_a_row < self._allowed:
            return
        finite_P = torch.isfinite(result.grad_norms_P).tolist()
        gradients = [name for name, finite in zip(self._shards, finite_P, strict=True) if not finite]
        found = {
            "images_seen": images_seen,
            "weights_not_finite": weights,
            "gradients_not_finite": gradients,
            "steps": self._streak,
        }
        path = self._run / f"not-finite-{step}.json"
        self._topology.on_first(lambda: write_text(path, json.dumps(found, indent=1, allow_nan=False)))
        reason = f"{len(weights)} weights are not finite" if weights else f"{self.in_a_row} steps in a row were skipped"
        raise ValueError(
            f"step {step} ({images_seen} images seen): the gradient norm is {result.grad_norm}: "
            f"the learning rate is too high, or a sample is broken; {reason}, see {path}"
        )

    def _not_finite_weights(self) -> list[str]:
        """Names of the weights with values that are not finite on any rank."""
        ours = [name for name, shard in self._shards.items() if not bool(torch.isfinite(shard.values).all())]
        return sorted({name for names in self._topology.on_every(lambda: ours) for name in names})


def _number(value: float) -> float | str:
    """`value` for JSON, which has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
