"""`megadit train`: start the local ranks of a recipe, or be one of the ranks that somebody started."""

import os
from collections.abc import Sequence
from pathlib import Path

from megadit.launcher.environment import Ranks
from megadit.launcher.failures import end_with
from megadit.launcher.join import launch_or_join
from megadit.recipe import load


def train(source: str, overrides: Sequence[str] = (), run: Path | None = None, resume: str = "auto") -> int:
    """Train the recipe `source` with `overrides` in the folder `run` (default: runs/NAME); returns the exit code.

    `resume` says what to begin with, see megadit/training/resuming.py; a restart by torchrun goes on with what the
    first start has begun. Raises ValueError for a recipe, an environment, a number of ranks or a `resume` that cannot
    be used.
    """
    recipe = load(source, overrides)
    folder = run or Path("runs") / recipe.name

    def be_a_rank(_: Ranks) -> int:
        from megadit.training import resuming, trainer

        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        begin = resuming.AUTO if resume == resuming.NEVER and restarted else resume
        return trainer.train(recipe, folder, end_with, begin)

    command = ["train", source, *overrides, "--run", str(folder), "--resume", resume]
    return launch_or_join(recipe.engine.num_ranks, be_a_rank, command)
