"""`megadit train`: start the local ranks of a recipe, or be one of the ranks that somebody started."""

from collections.abc import Sequence
from pathlib import Path

from megadit.launcher.environment import detect, export
from megadit.launcher.failures import end_with
from megadit.launcher.local import launch
from megadit.launcher.processes import follow_parent
from megadit.recipe import load


def train(source: str, overrides: Sequence[str] = (), run: Path | None = None) -> int:
    """Train the recipe `source` with `overrides` in the folder `run` (default: runs/NAME); returns the exit code.

    Raises ValueError for a recipe, an environment or a number of ranks that cannot be used.
    """
    follow_parent()
    recipe = load(source, overrides)
    run = run or Path("runs") / recipe.name
    ranks = detect()
    if not ranks.launched and recipe.engine.num_ranks > 1:
        return launch(recipe.engine.num_ranks, ["-m", "megadit", "train", source, *overrides, "--run", str(run)])
    if ranks.launched:
        export(ranks)
    from megadit.training import trainer

    return trainer.train(recipe, run, end_with)
