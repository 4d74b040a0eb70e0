"""A study: a folder of trials of one recipe, with Optuna's storage beside them.

STUDY/recipe.yaml      the resolved recipe; a trial is this recipe with overrides
STUDY/study.yaml       what was asked: metric, data, and each search (its space, grid or random)
STUDY/study.db         Optuna's storage: parameters, states, values; optuna-dashboard reads it
STUDY/trials/NAME/     one ordinary run folder for each trial, with its log
STUDY/claims/NAME      locked by the sweep that has the trial in hand

Several sweeps may work on one study. A trial belongs to the one that holds the lock on its claim; the system frees it
when that process ends, however it ends, so what a killed sweep left is taken up again at once.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from megadit import recipe as recipes
from megadit.files import write_text
from megadit.recipe import Recipe
from megadit.tuning.curve import LOSS, Divergence
from megadit.tuning.space import Point, trial_name

FORMAT_VERSION = 2  # in 1 the metric was `training` or `validation`, of the loss
RECIPE_NAME, STUDY_NAME, STORAGE_NAME = "recipe.yaml", "study.yaml", "study.db"
_STUDY_IN_STORAGE = "megadit"  # Optuna's name of the one study in the file
_LOCK_SECONDS = 60  # how long SQLite waits for another process that writes
_UNFINISHED = (TrialState.WAITING, TrialState.RUNNING)

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every trial that it loads or adds


@dataclass(frozen=True)
class Trial:
    """One point of a study. `value` is what is minimised, for a finished trial; `pruned` says why one was stopped."""

    id: int
    name: str
    overrides: Point
    recipe: Recipe
    run: Path
    value: float | None
    pruned: Divergence | None

    @property
    def done(self) -> bool:
        return self.value is not None or self.pruned is not None


class Claim:
    """A trial that this process has in hand until `release`."""

    def __init__(self, trial: Trial, storage: RDBStorage, lock: int) -> None:
        self.trial = trial
        self._storage = storage
        self._lock = lock

    def finish(self, value: float) -> None:
        self._storage.set_trial_state_values(self.trial.id, TrialState.COMPLETE, [value])

    def prune(self, divergence: Divergence) -> None:
        self._storage.set_trial_user_attr(self.trial.id, "pruned_at_step", divergence.step)
        self._storage.set_trial_user_attr(self.trial.id, "reason", divergence.reason)
        self._storage.set_trial_state_values(self.trial.id, TrialState.PRUNED)

    def release(self) -> None:
        os.close(self._lock)


class Study:
    """An open study."""

    def __init__(self, folder: Path) -> None:
        """Open the study in `folder`. Raises ValueError when there is none."""
        if not (folder / STUDY_NAME).is_file():
            raise ValueError(f"{folder} is not a study: it has no {STUDY_NAME}; `megadit sweep` makes one")
        self.folder = folder
        self.facts = _read_facts(folder)
        self.recipe = recipes.load(folder / RECIPE_NAME)
        self._storage = _open_storage(folder)
        self._optuna = optuna.load_study(study_name=_STUDY_IN_STORAGE, storage=self._storage)
        self._recipes: dict[Point, Recipe] = {}

    @property
    def metric(self) -> str:
        """By its full name."""
        return str(self.facts["metric"])

    @property
    def recipe_path(self) -> Path:
        return self.folder / RECIPE_NAME

    def trials(self) -> list[Trial]:
        """All trials, in the order in which they were asked for."""
        return [self._trial(frozen) for frozen in self._optuna.get_trials(deepcopy=False)]

    def add(self, points: Sequence[Point], search: Mapping[str, Any]) -> list[Trial]:
        """The trials of `points`, new where no trial has the same recipe yet.

        `search` says how the points were chosen; study.yaml keeps it. Raises ValueError when a new trial would get the
        name of another.
        """
        with _locked(self.folder):
            names = {self._identity(trial.overrides): trial.name for trial in self.trials()}
            bounds = self._bounds(points)
            for point in points:
                if (identity := self._identity(point)) not in names:
                    names[identity] = self._add(point, bounds, taken=set(names.values()))
            self.facts = _read_facts(self.folder)
            if search not in self.facts["searches"]:
                self.facts["searches"].append(dict(search))
                write_text(self.folder / STUDY_NAME, yaml.safe_dump(self.facts, sort_keys=False))
        trials = {trial.name: trial for trial in self.trials()}
        return [trials[name] for name in dict.fromkeys(names[self._identity(point)] for point in points)]

    def claim(self, trial: Trial) -> Claim | None:
        """Take the trial in hand; None when another process has it, or it is done."""
        (self.folder / "claims").mkdir(exist_ok=True)
        lock = os.open(self.folder / "claims" / trial.name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if self._storage.get_trial(trial.id).state not in _UNFINISHED:
            os.close(lock)
            return None
        self._storage.set_trial_state_values(trial.id, TrialState.RUNNING)
        return Claim(trial, self._storage, lock)

    def is_done(self, trial: Trial) -> bool:
        return self._storage.get_trial(trial.id).state.is_finished()

    def _add(self, point: Point, bounds: Mapping[str, BaseDistribution], taken: set[str]) -> str:
        name = trial_name(point)
        if name in taken:
            raise ValueError(f"{self.folder} has another trial named {name}; search this space in a study of its own")
        params = self._numbers(point)
        self._optuna.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=params,
                distributions={key: bounds[key] for key in params},
                user_attrs={"name": name, "overrides": list(point)},
            )
        )
        return name

    def _bounds(self, points: Sequence[Point]) -> dict[str, BaseDistribution]:
        """For Optuna: the range of each key."""
        values: dict[str, list[float]] = {}
        for point in points:
            for key, number in self._numbers(point).items():
                values.setdefault(key, []).append(number)
        return {key: FloatDistribution(min(numbers), max(numbers)) for key, numbers in values.items()}

    def _numbers(self, point: Point) -> dict[str, float]:
        """Those values of a point that are numbers: what Optuna can store and compare."""
        numbers = {}
        for override in point:
            key = override.partition("=")[0]
            value = value_at(self._recipe(point), key)
            if isinstance(value, int | float):
                numbers[key] = float(value)
        return numbers

    def _trial(self, frozen: FrozenTrial) -> Trial:
        attributes = frozen.user_attrs
        point = tuple(attributes["overrides"])
        pruned = None
        if frozen.state == TrialState.PRUNED:
            pruned = Divergence(attributes["pruned_at_step"], attributes["reason"])
        return Trial(
            id=frozen._trial_id,
            name=attributes["name"],
            overrides=point,
            recipe=self._recipe(point),
            run=self.folder / "trials" / attributes["name"],
            value=frozen.value if frozen.state == TrialState.COMPLETE else None,
            pruned=pruned,
        )

    def _recipe(self, point: Point) -> Recipe:
        if point not in self._recipes:
            self._recipes[point] = recipes.load(self.recipe_path, point)
        return self._recipes[point]

    def _identity(self, point: Point) -> str:
        """Equal for two points that give one recipe, however they spell it."""
        return json.dumps({key: new for key, (_, new) in recipes.differences(self.recipe, self._recipe(point)).items()})


def open_or_create(folder: Path, recipe: Recipe, metric: str, data: Mapping[str, Any]) -> Study:
    """The study of `recipe` in `folder`. `metric`: its full name; `data`: url and fingerprint of the training data.

    Settings that have no effect on a run (engine, workers, where the data lie) may differ from before: those given now
    are used. Raises ValueError for a study of another recipe, metric or data, naming what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        exists = (folder / STUDY_NAME).is_file()
        if exists:
            _check_same(folder, recipe, metric, data)
        write_text(folder / RECIPE_NAME, recipes.dump(recipe))
        if not exists:
            optuna.create_study(storage=_open_storage(folder), study_name=_STUDY_IN_STORAGE, load_if_exists=True)
            facts: dict[str, Any] = {"version": FORMAT_VERSION, "metric": metric, "data": dict(data), "searches": []}
            write_text(folder / STUDY_NAME, yaml.safe_dump(facts, sort_keys=False))
    return Study(folder)


def count_states(trials: Sequence[Trial]) -> dict[str, int]:
    """How many trials are finished, pruned and unfinished."""
    finished = sum(trial.value is not None for trial in trials)
    pruned = sum(trial.pruned is not None for trial in trials)
    return {"finished": finished, "pruned": pruned, "unfinished": len(trials) - finished - pruned}


def value_at(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key, as YAML has it."""
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def what_matters(there: Recipe, here: Recipe) -> recipes.Differences:
    """What makes numbers of two runs incomparable: validation, too, which is free in one run."""
    changed = recipes.differences(there, here)
    kept = {key for key in changed if key in changed.matter or key.split(".")[0] == "validation"}
    return recipes.Differences({key: changed[key] for key in sorted(kept)}, changed.marks)


def _check_same(folder: Path, recipe: Recipe, metric: str, data: Mapping[str, Any]) -> None:
    changed = what_matters(recipes.load(folder / RECIPE_NAME), recipe)
    matter = [str(changed)] if changed else []
    facts = _read_facts(folder)
    if facts["metric"] != metric:
        matter.append(f"metric: {facts['metric']} there, {metric} now")
    if facts["data"]["fingerprint"] != data["fingerprint"]:
        matter.append(f"data: fingerprint {facts['data']['fingerprint'][:12]} there, {data['fingerprint'][:12]} now")
    if matter:
        raise ValueError(f"{folder} is a study of something else ({'; '.join(matter)}); give another folder")


def _open_storage(folder: Path) -> RDBStorage:
    url = f"sqlite:///{(folder / STORAGE_NAME).resolve()}"
    return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _LOCK_SECONDS}})


def _read_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = yaml.safe_load((folder / STUDY_NAME).read_text())
    if facts["version"] == 1:
        facts |= {"version": FORMAT_VERSION, "metric": f"{facts['metric']}/{LOSS}"}
    if facts["version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder / STUDY_NAME}: format version {facts['version']!r}; this megadit reads 1 to {FORMAT_VERSION}"
        )
    return facts


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing what the study is while the body runs."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
