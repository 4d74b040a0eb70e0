"""What a study found, in words: the best learning rate at each width, and whether it stays the same."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megadit.tuning.optimum import LrCurve, Optimum, find_optimum
from megadit.tuning.study import Study, count_states

_NOTES = {
    "fitted": "",
    "cliff": "the next higher rate diverges",
    "edge": "at the end of the rates tried: the minimum may lie beyond",
    "few": "too few rates to fit a minimum",
}


def format_report(study: Study, curves: Sequence[LrCurve]) -> str:
    """The table of a study, one line for each width, and what it says of the transfer over widths."""
    optima = [find_optimum(curve) for curve in curves]
    counts = ", ".join(f"{number} {state}" for state, number in count_states(study.trials()).items())
    seeds = max(len(curve.loss_SL) for curve in curves)
    lines = [
        f"{title(study)}: trials {counts}; {study.metric}, mean of {seeds} seed(s)",
        f"{'width':>6}  {'best lr':>8}  {'minimum at log2 lr':>18}  {'loss':>7}  note",
    ]
    for curve, optimum in zip(curves, optima, strict=True):
        settings = [f"{key}={_short(value)}" for key, value in curve.settings.items()]
        note = "; ".join(filter(None, [_NOTES[optimum.kind], *settings]))
        columns = f"{curve.width:>6}  {power(optimum.best):>8}  {_minimum(optimum):>18}  {optimum.loss:>7.4f}  {note}"
        lines.append(columns.rstrip())
    return "\n".join([*lines, *(_verdict(curves, optima) if len(curves) > 1 else [])])


def write_table(studies: Sequence[Study], path: Path) -> None:
    """Every trial that is done as a line of a CSV file: what it varied, its value or why it was pruned."""
    keys = sorted({override.partition("=")[0] for study in studies for t in study.trials() for override in t.overrides})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["study", *keys, studies[0].metric, "pruned at step"])
        for study in studies:
            for trial in filter(lambda trial: trial.done, study.trials()):
                stated = dict(override.split("=", 1) for override in trial.overrides)
                value = "" if trial.value is None else f"{trial.value:.6g}"
                step = "" if trial.pruned is None else trial.pruned.step
                table.writerow([study.folder.name, *(stated.get(key, "") for key in keys), value, step])


def title(study: Study) -> str:
    """The name of a study and its parametrization."""
    return f"{study.folder.name} ({study.recipe.parametrization.kind})"


def power(log2: float) -> str:
    """A learning rate as a recipe spells it."""
    return f"2^{round(log2, 3):g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _minimum(optimum: Optimum) -> str:
    if optimum.fitted is None:
        return "-"
    return f"{optimum.fitted:.2f}" + ("" if optimum.uncertainty is None else f" +- {optimum.uncertainty:.2f}")


def _verdict(curves: Sequence[LrCurve], optima: Sequence[Optimum]) -> list[str]:
    """How far the best learning rate moves over the widths, and what the narrowest model's does for the others."""
    widths = f"widths {curves[0].width} to {curves[-1].width}"
    moved = max(optimum.best for optimum in optima) - min(optimum.best for optimum in optima)
    lines = [f"over {widths} the best rate moves by {moved:.3g} octave(s) on the grid"]
    if all(optimum.fitted is not None for optimum in optima):
        estimates = [optimum.estimate for optimum in optima]
        lines[0] += f", by {max(estimates) - min(estimates):.2f} between the fitted minima"
    if any(optimum.kind == "edge" for optimum in optima):
        lines[0] += " (at least: a best rate lies at the end of those tried)"
    shared = optima[0].best
    losses = [curve.loss_at(shared) for curve in curves]
    shown = ", ".join("diverged or not tried" if loss is None else f"{loss:.4f}" for loss in losses)
    known = [loss for loss in losses if loss is not None]
    better = len(known) == len(losses) and bool(np.all(np.diff(known) < 0))
    verb = "is" if better else "is not always"
    lines.append(f"at {power(shared)}, the best of width {curves[0].width}, wider {verb} better: {shown}")
    return lines
