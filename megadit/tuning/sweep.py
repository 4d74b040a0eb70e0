"""`megadit sweep`: train the points of a search space, several at once, and remember what came of each."""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

import torch

from megadit import models, recipe as recipes
from megadit.data.format.manifest import Manifest
from megadit.exit_codes import DONE, INTERRUPTED
from megadit.launcher.environment import detect
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe
from megadit.training import run_folder
from megadit.training.data_fits import check_data_fits
from megadit.training.signals import StopRequest, stop_on_signal
from megadit.tuning import space as spaces, trial as trials
from megadit.tuning.curve import Curve, Divergence, find_divergence, full_name
from megadit.tuning.space import Dimension, Point
from megadit.tuning.study import Claim, Study, Trial, count_states, open_or_create, what_matters

POLL_SECONDS = 0.5
Sampler = Literal["grid", "random"]

logger = logging.getLogger(__name__)


def sweep(
    source: str,
    folder: Path | None,
    space: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    preset: Literal["paper"] | None = None,
    sampler: Sampler = "grid",
    num_trials: int | None = None,
    seed: int = 0,
    metric: str = "training",
    num_workers: int = 1,
) -> int:
    """Train the recipe `source` with `overrides` at the points of `space`, as the study in `folder` (studies/NAME).

    A grid has every combination of the values of `space`; a random search `num_trials` of them, drawn from `seed`.
    `preset` adds the keys and ranges of `space.paper_space`. `metric` is what is compared, see `curve.full_name`.
    `num_workers` trials run at once. What is done already is
    not done again. Returns the exit code: 0 when all points are done, 75 when interrupted (the same call resumes).

    Raises ValueError for a recipe, a space, a study or data that cannot be used, before anything is trained, and with
    the message of a trial that failed other than by diverging.
    """
    if detect().launched:
        raise ValueError("a sweep is not a rank: start it by itself, several times on one study if you like")
    base = _base_recipe(source, overrides)
    metric = full_name(metric, base)
    space = [*(spaces.paper_space(base) if preset == "paper" else []), *space]
    points = _points(spaces.parse_space(space), sampler, num_trials, seed)
    manifest = _check(base, source, overrides, points, metric)
    max_text_tokens = manifest.text.max_tokens if manifest.text else 0
    data = {"url": base.data.url, "fingerprint": manifest.fingerprint, "max_text_tokens": max_text_tokens}
    study = open_or_create(folder or Path("studies") / base.name, base, metric, data)
    search = {"space": list(space), "sampler": sampler, "num_trials": num_trials, "seed": seed}
    asked = sorted(study.add(points, search), key=_cost)  # small models first, for a quick look
    with stop_on_signal() as stop:
        status = _Sweep(study, asked, num_workers, stop).run()
    _log_summary(study)
    return status


@dataclass
class _Running:
    """A trial that trains now."""

    claim: Claim
    process: ForkServerProcess
    started: float
    next_look: float
    stopped: bool = False

    def stop(self) -> None:
        """Ask it to write a checkpoint and end."""
        if not self.stopped:
            self.process.terminate()
            self.stopped = True


class _Sweep:
    """The trials of one call, `num_workers` at a time. One thread; processes do the work."""

    def __init__(self, study: Study, asked: Sequence[Trial], num_workers: int, stop: StopRequest) -> None:
        self._study = study
        self._left = [trial for trial in asked if not trial.done]
        self._num_asked = len(asked)
        self._num_workers = num_workers
        self._stop = stop
        self._running: dict[int, _Running] = {}  # by slot, of 0 ... num_workers - 1

    def run(self) -> int:
        try:
            while self._left:
                self._fill_slots()
                if self._running:
                    wait([running.process.sentinel for running in self._running.values()], POLL_SECONDS)
                elif self._stop:
                    return INTERRUPTED
                elif self._left:
                    time.sleep(POLL_SECONDS)  # another sweep has the rest in hand; should it die, we take them up
                for slot, running in list(self._running.items()):
                    self._look_at(slot, running)
            return DONE
        finally:
            self._stop_all()

    def _fill_slots(self) -> None:
        ours = {running.claim.trial.name for running in self._running.values()}
        for trial in [trial for trial in self._left if trial.name not in ours]:
            if self._stop or len(self._running) == self._num_workers:
                return
            claim = self._study.claim(trial)
            if claim is not None:
                self._start(claim)
            elif self._study.is_done(trial):
                self._left.remove(trial)

    def _start(self, claim: Claim) -> None:
        trial = claim.trial
        trial.run.mkdir(parents=True, exist_ok=True)
        _check_run(trial)
        if self._settle(claim, "found finished"):
            return
        slot = next(slot for slot in range(self._num_workers) if slot not in self._running)
        environment = _environment(os.environ, slot, self._num_workers, trial.recipe.engine.num_ranks)
        process = trials.start(self._study.recipe_path, trial.overrides, trial.run, environment)
        self._running[slot] = _Running(claim, process, time.monotonic(), time.monotonic() + POLL_SECONDS)

    def _look_at(self, slot: int, running: _Running) -> None:
        now = time.monotonic()
        if self._stop:
            running.stop()
        if not running.process.is_alive():
            del self._running[slot]
            self._after(running)
        elif now >= running.next_look:
            trial = running.claim.trial
            if find_divergence(Curve.read(trial.run).losses, trial.recipe):
                running.stop()
            running.next_look = now + max(POLL_SECONDS, 20 * (time.monotonic() - now))  # long curves take a while

    def _after(self, running: _Running) -> None:
        """Settle a trial whose process has ended; one that was interrupted is left for another time."""
        claim, code = running.claim, running.process.exitcode
        assert code is not None
        took = f"after {time.monotonic() - running.started:.0f} s"
        if code in (DONE, INTERRUPTED) or running.stopped:
            if not self._settle(claim, took):
                claim.release()
            return
        message = trials.failure(claim.trial.run, code)
        if not trials.is_divergence(message):
            claim.release()
            raise ValueError(f"trial {claim.trial.name}: {message} (its log: {claim.trial.run / trials.LOG_NAME})")
        self._prune(claim, Divergence(len(Curve.read(claim.trial.run).losses), message), took)

    def _settle(self, claim: Claim, took: str) -> bool:
        """Store what the trial's curve says, if it says something yet."""
        trial, curve = claim.trial, Curve.read(claim.trial.run)
        if divergence := find_divergence(curve.losses, trial.recipe):
            self._prune(claim, divergence, took)
            return True
        value = curve.value(trial.recipe, self._study.metric)
        if value is None:
            return False
        claim.finish(value)
        self._done(claim, f"{value:.4f} {took}")
        return True

    def _prune(self, claim: Claim, divergence: Divergence, took: str) -> None:
        claim.prune(divergence)
        self._done(claim, f"pruned at step {divergence.step} {took}: {divergence.reason}")

    def _done(self, claim: Claim, what: str) -> None:
        claim.release()
        self._left.remove(claim.trial)
        logger.info("[%d/%d] %s: %s", self._num_asked - len(self._left), self._num_asked, claim.trial.name, what)

    def _stop_all(self) -> None:
        """Have what still runs, after an error, write a checkpoint and end."""
        for running in self._running.values():
            running.stop()
        for running in self._running.values():
            running.process.join()
            running.claim.release()


def _log_summary(study: Study) -> None:
    counts = count_states(study.trials())
    logger.info("%s: %s", study.folder, ", ".join(f"{number} {state}" for state, number in counts.items()))
    finished = [trial for trial in study.trials() if trial.value is not None]
    if finished:
        best = min(finished, key=lambda trial: trial.value if trial.value is not None else math.inf)
        logger.info("best: %s with %s %.4f", best.name, study.metric, best.value)


def _base_recipe(source: str, overrides: Sequence[str]) -> Recipe:
    """The recipe with what a sweep needs of it: a loss for each step (none is skipped), no checkpoint but the last."""
    recipe = recipes.one_stage(recipes.load(source, overrides), "megadit sweep")
    settings = ["training.log_every_steps=1", "training.max_skipped_steps=1"]
    settings.append(f"checkpoints.every_images={recipe.training.num_images}")
    return recipes.load(source, [*overrides, *settings])


def _points(space: Sequence[Dimension], sampler: Sampler, num_trials: int | None, seed: int) -> list[Point]:
    if sampler == "grid":
        if num_trials is not None:
            raise ValueError("a grid has as many trials as it has points; a number of trials is for random search")
        return spaces.grid(space)
    if num_trials is None or num_trials < 1:
        raise ValueError("random search needs a number of trials")
    return spaces.draw(space, num_trials, seed)


def _check(base: Recipe, source: str, overrides: Sequence[str], points: Sequence[Point], metric: str) -> Manifest:
    """Raise ValueError unless every point can be trained and compared: its recipe, its parameter table, its data.

    Returns the manifest of the base recipe's data.
    """
    manifest = Manifest.load(base.data.url)
    checked: set[str] = set()
    for point in points:
        recipe = recipes.load(source, [*overrides, *point])
        full_name(metric, recipe)
        facts = recipe.model_dump_json(include={"model": True, "parametrization": True, "data": True, "encoders": True})
        if facts not in checked:
            build_table(recipe)
            check_data_fits(recipe, Manifest.load(recipe.data.url))
            checked.add(facts)
    return manifest


def _check_run(trial: Trial) -> None:
    """Raise ValueError when the trial's folder holds a run of another recipe."""
    if not (trial.run / "recipe.yaml").exists():
        return
    if matter := what_matters(run_folder.load_recipe(trial.run), trial.recipe):
        raise ValueError(f"{trial.run} holds a run of another recipe ({', '.join(matter)} differ); remove it")


def _cost(trial: Trial) -> float:
    """What a trial costs, up to a factor."""
    return float(models.num_flops(trial.recipe.model, 1)) * trial.recipe.training.num_images


def _environment(environ: Mapping[str, str], slot: int, num_workers: int, num_ranks: int) -> dict[str, str]:
    """The environment of the trials in a slot: its share of the cores, and of the GPUs where there are several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // (num_workers * num_ranks))), **environ}
    num_devices = torch.cuda.device_count()
    if num_devices > 1:
        stated = environ.get("CUDA_VISIBLE_DEVICES")
        devices = stated.split(",") if stated else [str(number) for number in range(num_devices)]
        share = devices[slot::num_workers] or [devices[slot % num_devices]]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share)
    return environment
