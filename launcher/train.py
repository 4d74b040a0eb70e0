"""`megadit train`: start the local ranks of a recipe, or be one of the ranks that somebody started."""

import os
from collections.abc import Sequence
from pathlib import Path

from megadit.launcher.environment import detect, export
from megadit.launcher.failures import end_with
from megadit.launcher.local import launch
from megadit.launcher.processes import follow_parent
from megadit.recipe import load


def train(source: str, overrides: Sequence[str] = (), run: Path | None = None, resume: str = "auto") -> int:
    """Train the recipe `source` with `overrides` in the folder `run` (default: runs/NAME); returns the exit code.

    `resume` says what to begin with, see megadit/training/resuming.py; a restart by torchrun goes on with what the
    first start has begun. Raises ValueError for a recipe, an environment, a number of ranks or a `resume` that cannot
    be used.
    """
    follow_parent()
    recipe = load(source, overrides)
    run = run or Path("runs") / recipe.name
    ranks = detect()
    if not ranks.launched and recipe.engine.num_ranks > 1:
        arguments = [source, *overrides, "--run", str(run), "--resume", resume]
        return launch(recipe.engine.num_ranks, ["-m", "megadit", "train", *arguments])
    if ranks.launched:
        export(ranks)
    from megadit.training import resuming, trainer

    if resume == resuming.NEVER and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        resume = resuming.AUTO
    return trainer.train(recipe, run, end_with, resume)
