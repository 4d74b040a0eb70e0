"""Where a run begins: at its own newest checkpoint, at that of another run, or at the first step.

`megadit train --resume` says which:

    auto          its own newest whole checkpoint, the copy of one at checkpoints.copy_url, or else the first step
    never         the first step, and only where there is nothing that this would leave behind
    PATH or URL   as auto, but in place of the first step the newest whole checkpoint of another run (its folder, or
                  its checkpoints.copy_url), or that one checkpoint

A run is a function of its recipe, so the other run must have the same one but for keys that are free.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from megadit import recipe as recipes
from megadit.data.format.manifest import Manifest
from megadit.data.storage import open_store
from megadit.distributed import Topology
from megadit.recipe import Recipe
from megadit.training import checkpoint, run_folder
from megadit.training.checkpoint import CheckpointError
from megadit.training.checkpoint.copies import RECIPE, Copies
from megadit.training.checkpoint.folders import HEADER, images_seen

AUTO, NEVER = "auto", "never"
CHOICES = "auto, never, the folder of a run or of a checkpoint, or the checkpoints.copy_url of a run"
logger = logging.getLogger(__name__)


def images_begun(run: Path) -> int:
    """Images seen by the newest checkpoint of a run, of which the name alone is looked at; 0 where there is none."""
    own = checkpoint.newest_first(run / "checkpoints")
    return images_seen(own[0]) if own else 0


def check(resume: str, run: Path, recipe: Recipe, manifests: Mapping[int, Manifest]) -> None:
    """Raise ValueError where `run` cannot begin as `resume` says. Called on one rank, before anything is written."""
    own = checkpoint.newest_first(run / "checkpoints")
    if resume == NEVER:
        copies = recipe.checkpoints.copy_url
        if own:
            raise ValueError(
                f"{run} has checkpoints, the newest is {own[0].name}: go on without --resume never, or "
                "give another --run"
            )
        if copies and next(iter(open_store(copies).list("images-")), None):
            raise ValueError(
                f"{copies} has copies of checkpoints: go on without --resume never, or give another "
                "checkpoints.copy_url"
            )
    elif resume != AUTO and not own:
        _check_other(resume, recipe, manifests)


def starting_point(resume: str, run: Path, recipe: Recipe, topology: Topology) -> Path | None:
    """The checkpoint to begin with; None for the first step. Called by all ranks together, after `check`.

    Raises CheckpointError when there are checkpoints and none is whole, or when it is of another run.
    """
    if resume == NEVER:
        return None
    own = checkpoint.newest_of_run(run, recipe, topology)
    if own is not None or resume == AUTO:
        return own
    if _is_url(resume):
        return topology.on_first(lambda: Copies(resume, recipe).fetch_newest(run / "checkpoints"))
    path = Path(resume)
    if not _is_checkpoint(path):
        return checkpoint.newest_valid(path / "checkpoints", topology)
    found = topology.on_every(lambda: checkpoint.find_damage(path, topology.rank, topology.size))
    if damage := next(filter(None, found), None):
        raise CheckpointError(f"--resume {path}: the checkpoint is damaged: {damage}")
    return path


def _check_other(resume: str, recipe: Recipe, manifests: Mapping[int, Manifest]) -> None:
    place = f"--resume {resume}"
    if _is_url(resume):
        store = open_store(resume)
        headers = [Path(name).parent for name in store.list("images-") if name.endswith(f"/{HEADER}")]
        if not headers:
            raise ValueError(f"{place}: there is no copy of a checkpoint; allowed: {CHOICES}")
        there = recipes.parse_text(store.get(RECIPE), store.url(RECIPE))
        recipes.require_same_past(there, recipe, max(map(images_seen, headers)), place)
        return
    path = Path(resume)
    other = path.parent.parent if _is_checkpoint(path) else path
    begun = checkpoint.read_header(path).images_seen if _is_checkpoint(path) else images_begun(path)
    if not _is_checkpoint(path) and not checkpoint.newest_first(path / "checkpoints"):
        raise ValueError(f"{place}: there is no checkpoint; allowed: {CHOICES}")
    if (other / RECIPE).is_file():
        recipes.require_same_past(run_folder.load_recipe(other), recipe, begun, place)
        for stage in recipes.plan(recipe):
            if stage.number == 0 or stage.first_image < begun:
                run_folder.require_same_data(other, manifests[stage.number], stage.number)
    else:
        logger.warning(
            "%s: no run is around this checkpoint, so its recipe is unknown; only the model is compared", place
        )


def _is_url(resume: str) -> bool:
    return "://" in resume


def _is_checkpoint(path: Path) -> bool:
    return (path / HEADER).is_file()
