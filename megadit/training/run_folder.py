"""The run folder: what was asked for, by which code, and everything that came of it.

RUN/recipe.yaml        the resolved recipe
RUN/parameters.json    the parameter table: name, shape, role, width multiplier, init, lr, weight decay
RUN/environment.json   versions and the git revision, one entry for every start
RUN/data.json          the manifest of the training data; that of a later stage is data-stage-1.json and so on
RUN/started_from.json  where the first weights come from, see from_weights.py
RUN/metrics.jsonl      one line per logged step and validation
RUN/lock               held, and says by whom, while the run is trained
RUN/checkpoints/       see checkpoint.py
"""

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megadit import recipe as recipes
from megadit.data.format.manifest import Manifest
from megadit.distributed import Topology
from megadit.files import write_text
from megadit.parametrization.spec import ParamSpec
from megadit.parametrization.table import to_rows
from megadit.recipe import Recipe
from megadit.training.checkpoint.folders import read_header
from megadit.training.data_fits import require_one_encoding

LOCK = "lock"
logger = logging.getLogger(__name__)


@contextmanager
def owned(run: Path, topology: Topology) -> Iterator[None]:
    """Hold the run for as long as the context lasts; ranks together. Raises ValueError that says who has it already.

    The system frees the lock when the first rank's process ends, however it ends.
    """
    lock = topology.on_first(lambda: _lock(run))
    try:
        yield
    finally:
        if topology.is_first:
            os.close(lock)


def _lock(run: Path) -> int:
    run.mkdir(parents=True, exist_ok=True)
    lock = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 1000, 0).decode()
        os.close(lock)
        raise ValueError(f"{run} is being trained by {owner}: wait, stop that one, or give another --run") from None
    os.truncate(lock, 0)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    os.pwrite(lock, f"process {os.getpid()} of {platform.node()} since {since}".encode(), 0)
    return lock


def prepare(
    run: Path, recipe: Recipe, specs: Sequence[ParamSpec], manifests: Mapping[int, Manifest], images_seen: int
) -> None:
    """Create the folder, or check that it holds the same run: ValueError names the keys that differ and matter.

    `manifests` are those of the stages that are left, by number; `images_seen` says where the run is.
    """
    run.mkdir(parents=True, exist_ok=True)
    if (run / "recipe.yaml").exists():
        changed = recipes.require_same_past(load_recipe(run), recipe, images_seen, str(run))
        stages = recipes.plan(recipe)
        for number, manifest in manifests.items():
            if number == 0 or stages[number].first_image < images_seen:
                require_same_data(run, manifest, number)
            else:  # a stage that may have been added
                require_one_encoding(stages[0].recipe, load_manifest(run), stages[number].recipe, manifest)
        require_same_table(run, specs)
        if changed:
            logger.info("these keys are free and were changed: %s", changed)
    write_text(run / "parameters.json", json.dumps(to_rows(specs), indent=1))
    for number, manifest in manifests.items():
        write_text(_data_file(run, number), manifest.dump().decode())
    path = run / "environment.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    write_text(path, json.dumps([*starts, _environment()], indent=1))
    write_text(run / "recipe.yaml", recipes.dump(recipe))  # last: where it is, the rest is, whenever a start was killed


def load_recipe(run: Path) -> Recipe:
    """The recipe of an existing run."""
    path = run / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is not a run folder: it has no recipe.yaml")
    return recipes.parse_text(path.read_bytes(), str(path))


def load_manifest(run: Path, stage: int = 0) -> Manifest:
    """The manifest of the data that a stage of an existing run was trained on."""
    return Manifest.model_validate_json(_data_file(run, stage).read_text())


def _data_file(run: Path, stage: int) -> Path:
    return run / ("data.json" if stage == 0 else f"data-stage-{stage}.json")


def recipe_of(checkpoint: Path) -> Recipe:
    """The recipe, without stages, that a checkpoint of a run was trained with last: that of its stage."""
    recipe = load_recipe(checkpoint.parents[1])
    stages = recipes.plan(recipe)
    return stages[read_header(checkpoint).stage].recipe if recipe.stages else stages[0].recipe


def require_same_table(run: Path, specs: Sequence[ParamSpec]) -> None:
    """Raise ValueError unless `run` was trained with this parameter table: base shapes are a file, which may change.

    Hyperparameters, which stages change, are not compared: they follow from the recipe and the rest of the table.
    """
    there = {row["name"]: row for row in json.loads((run / "parameters.json").read_text())}
    for spec, row in zip(specs, to_rows(specs), strict=True):
        stored = there.get(row["name"], {})
        if changed := [key for key in row if key not in spec.hyperparameters and stored.get(key) != row[key]]:
            raise ValueError(
                f"{run} was trained with another parameter table: {row['name']}: {changed[0]} "
                f"{stored.get(changed[0])!r} there, {row[changed[0]]!r} now; give it the base shapes that it began with"
            )


def require_same_data(run: Path, manifest: Manifest, stage: int = 0) -> None:
    """Raise ValueError unless the stage of `run` was trained on the data of `manifest`."""
    old, new = load_manifest(run, stage).fingerprint, manifest.fingerprint
    if old != new:
        raise ValueError(f"{run} was trained on other data: fingerprint {old[:12]} there, {new[:12]} now")


def _environment() -> dict[str, Any]:
    packages = ("megadit", "torch", "deepspeed", "numpy", "diffusers", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hostname": platform.node(),
        **versions,
    }


def _git_revision() -> str | None:
    """The revision of the checkout that this code runs from; None for an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
