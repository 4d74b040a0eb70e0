"""Loss against learning rate at each width of a study, and where its minimum lies.

A learning rate counts when all its seeds are done; one at which a seed diverged is no candidate. The minimum is that of
the parabola in log2 of the learning rate through the best mean over seeds and its two neighbours. Its uncertainty is
the standard deviation over bootstrap draws of the seeds, which are drawn whole: a seed's trials share samples, noise
and timesteps. A best learning rate at the end of the grid shows no minimum, so nothing is fitted there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megadit import recipe as recipes
from megadit.tuning.study import Study, Trial, count_states

NUM_BOOTSTRAP_DRAWS = 2000
_WIDTH, _LR, _SEED = "model.width", "optimizer.lr", "seed"
# What is tuned beside the learning rate: of several settings, each width shows its best.
TUNED = ("optimizer.", "objective.", "parametrization.output_mult")

# fitted: a minimum between neighbours; cliff: the next higher learning rate diverges, the next lower is worse;
# edge: the best is the lowest or highest learning rate tried; few: fewer than three learning rates.
OptimumKind = Literal["fitted", "cliff", "edge", "few"]


@dataclass(frozen=True)
class LrCurve:
    """Trials that differ in learning rate and seed alone, S seeds at L learning rates.

    log2_lr_L: ascending; loss_SL: values of the trials; diverged: log2 of the learning rates where a seed was pruned.
    `settings` are the other hyperparameters, by key; `all_trials` has those of the width's other settings, too.
    """

    width: int
    settings: Mapping[str, Any]
    trials: Sequence[Trial]
    all_trials: Sequence[Trial]
    log2_lr_L: np.ndarray
    loss_SL: np.ndarray
    diverged: tuple[float, ...]

    @property
    def mean_L(self) -> np.ndarray:
        """Mean over seeds."""
        return self.loss_SL.mean(axis=0)

    def loss_at(self, log2_lr: float) -> float | None:
        """The mean at a learning rate; None where it diverged or was not tried."""
        (found,) = np.nonzero(self.log2_lr_L == log2_lr)
        return float(self.mean_L[found[0]]) if len(found) else None


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of a curve, as log2. `fitted` and its `uncertainty` are None where there is no basis."""

    kind: OptimumKind
    best: float
    loss: float
    fitted: float | None
    uncertainty: float | None

    @property
    def estimate(self) -> float:
        return self.best if self.fitted is None else self.fitted


def read_curves(study: Study) -> list[LrCurve]:
    """One curve for each width, narrowest first: of several settings the one with the lowest loss.

    Raises ValueError for a study without finished trials, or one that compares something other than widths.
    """
    trials = study.trials()
    _require_finished(study, trials)
    groups: dict[tuple[int, str], list[Trial]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for trial in trials:
        varied = {key: new for key, (_, new) in recipes.differences(study.recipe, trial.recipe).items()}
        others = {key: value for key, value in varied.items() if key not in (_WIDTH, _LR, _SEED)}
        if untunable := [key for key in others if not key.startswith(TUNED)]:
            raise ValueError(f"{study.folder} varies {', '.join(untunable)}; only widths are compared: study it apart")
        settings[repr(others)] = others
        groups.setdefault((trial.recipe.model.width, repr(others)), []).append(trial)
    found: dict[int, LrCurve] = {}
    for (width, key), members in sorted(groups.items()):
        of_width = [trial for trial in trials if trial.recipe.model.width == width]
        curve = _curve(width, settings[key], members, of_width)
        if curve is not None and (width not in found or curve.mean_L.min() < found[width].mean_L.min()):
            found[width] = curve
    if not found:
        raise ValueError(f"{study.folder}: at no learning rate are the trials of all seeds finished yet")
    return list(found.values())


def find_optimum(curve: LrCurve) -> Optimum:
    """Where the curve is lowest."""
    mean_L = curve.mean_L
    best = int(mean_L.argmin())
    kind = _kind(curve, best)
    fitted = uncertainty = None
    if kind == "fitted":
        fitted = _vertex(curve.log2_lr_L, mean_L)
        uncertainty = _bootstrap(curve)
    return Optimum(kind, float(curve.log2_lr_L[best]), float(mean_L[best]), fitted, uncertainty)


def _require_finished(study: Study, trials: Sequence[Trial]) -> None:
    counts = count_states(trials)
    if not counts["finished"]:
        raise ValueError(
            f"{study.folder} has no finished trial: {counts['pruned']} pruned, {counts['unfinished']} unfinished"
        )


def _curve(
    width: int, settings: Mapping[str, Any], trials: Sequence[Trial], all_trials: Sequence[Trial]
) -> LrCurve | None:
    """The curve of a group; None while it has no learning rate that counts."""
    seeds = sorted({trial.recipe.seed for trial in trials})
    by_lr: dict[float, dict[int, Trial]] = {}
    for trial in trials:
        by_lr.setdefault(math.log2(trial.recipe.optimizer.lr), {})[trial.recipe.seed] = trial
    diverged = sorted(lr for lr, found in by_lr.items() if any(trial.pruned for trial in found.values()))
    whole = sorted(lr for lr, found in by_lr.items() if all(s in found and found[s].value is not None for s in seeds))
    if not whole:
        return None
    return LrCurve(
        width=width,
        settings=settings,
        trials=trials,
        all_trials=all_trials,
        log2_lr_L=np.array(whole),
        loss_SL=np.array([[by_lr[lr][seed].value for lr in whole] for seed in seeds]),
        diverged=tuple(diverged),
    )


def _kind(curve: LrCurve, best: int) -> OptimumKind:
    last = len(curve.log2_lr_L) - 1
    if last + len(curve.diverged) < 2:
        return "few"
    if best == 0:
        return "edge"
    if best < last and not any(curve.log2_lr_L[best] < lr < curve.log2_lr_L[best + 1] for lr in curve.diverged):
        return "fitted"
    return "cliff" if any(lr > curve.log2_lr_L[best] for lr in curve.diverged) else "edge"


def _vertex(log2_lr_L: np.ndarray, mean_L: np.ndarray) -> float:
    """The minimum of the parabola through the lowest point and its neighbours; the point itself at an end."""
    best = int(mean_L.argmin())
    if best in (0, len(mean_L) - 1):
        return float(log2_lr_L[best])
    x, y = log2_lr_L[best - 1 : best + 2], mean_L[best - 1 : best + 2]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])  # left <= 0 <= right
    if left == right:  # both 0: three equal losses
        return float(x[1])
    # The slope of the parabola is `left` and `right` in the middles of the two intervals, and linear in between.
    middle_left, middle_right = (x[0] + x[1]) / 2, (x[1] + x[2]) / 2
    return float(middle_left - left * (middle_right - middle_left) / (right - left))


def _bootstrap(curve: LrCurve) -> float | None:
    """The standard deviation of the minimum over draws of the seeds with replacement; None for a single seed."""
    num_seeds = len(curve.loss_SL)
    if num_seeds == 1:
        return None
    draws = np.random.Generator(np.random.Philox(0)).integers(num_seeds, size=(NUM_BOOTSTRAP_DRAWS, num_seeds))
    return float(np.std([_vertex(curve.log2_lr_L, curve.loss_SL[seeds].mean(axis=0)) for seeds in draws]))
