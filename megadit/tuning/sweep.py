"""`megadit sweep`: train the points of a search space, several at once, and remember what came of each."""

import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import optuna
import torch

from megadit import models, recipe as recipes
from megadit.data.manifest import Manifest
from megadit.launcher.environment import detect
from megadit.launcher.failures import DONE, INTERRUPTED
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe
from megadit.training import run_folder
from megadit.training.signals import StopRequest, stop_on_signal
from megadit.training.trainer import check_data_fits
from megadit.tuning import space as spaces, trial as trials
from megadit.tuning.curve import Curve, Divergence, Metric, find_divergence
from megadit.tuning.space import Dimension, Point
from megadit.tuning.study import Claim, Study, Trial, open_or_create

POLL_SECONDS = 0.5
# A sweep looks at each step's loss, and a trial that was begun has a checkpoint when it is stopped or done.
TRIAL_SETTINGS = ("training.log_every_steps=1", "checkpoints.keep=1")

logger = logging.getLogger(__name__)


def sweep(
    source: str,
    folder: Path,
    space: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    sampler: Literal["grid", "random"] = "grid",
    num_trials: int | None = None,
    seed: int = 0,
    metric: Metric = "training",
    num_workers: int = 1,
) -> int:
    """Train the recipe `source` with `overrides` at the points of `space`, as the study in `folder`.

    A grid has every combination of the values of `space`; a random search `num_trials` of them, drawn from `seed`.
    `num_workers` trials run at once. What is done already is not done again. Returns the exit code: 0 when all points
    are done, 75 when interrupted (the same call resumes).

    Raises ValueError for a recipe, a space, a study or data that cannot be used, before anything is trained, and with
    the message of a trial that failed other than by diverging.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if detect().launched:
        raise ValueError("a sweep is not a rank: start it once, or in several jobs on the same study, without torchrun")
    base = _base_recipe(source, overrides)
    points = _points(spaces.parse_space(space), sampler, num_trials, seed)
    data = _check(base, points, metric)
    study = open_or_create(folder, base, metric, data)
    search = {"space": list(space), "sampler": sampler, "num_trials": num_trials, "seed": seed}
    asked = sorted(study.add(points, search), key=_cost)  # small models first, for a quick look
    with stop_on_signal() as stop:
        return _Sweep(study, asked, num_workers, stop).run()
