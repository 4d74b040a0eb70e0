"""`megadit train`: start the local ranks of a recipe, or be one of the ranks that somebody started."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megadit.launcher.environment import Ranks
from megadit.launcher.failures import end_with
from megadit.launcher.join import launch_or_join
from megadit.recipe import load

if TYPE_CHECKING:
    from megadit.training.from_weights import WeightSource


def train(
    source: str,
    overrides: Sequence[str] = (),
    run: Path | None = None,
    resume: str = "auto",
    weights: "WeightSource | None" = None,
) -> int:
    """Train the recipe `source` with `overrides` in the folder `run` (default: runs/NAME); returns the exit code.

    `resume` says what to begin with, see megadit/training/resuming.py; a restart by torchrun goes on with what the
    first start has begun. `weights` are those of the first step, see megadit/training/from_weights.py. Raises
    ValueError for a recipe, an environment, a number of ranks, a `resume` or weights that cannot be used.
    """
    if weights is not None and resume != "auto":
        raise ValueError("--from-weights begins a run, and --resume goes on with one: give one of them")
    recipe = load(source, overrides)
    folder = run or Path("runs") / recipe.name

    def be_a_rank(_: Ranks) -> int:
        from megadit.training import resuming, trainer

        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        begin = resuming.AUTO if resume == resuming.NEVER and restarted else resume
        return trainer.train(recipe, folder, end_with, begin, weights)

    command = ["train", source, *overrides, "--run", str(folder), "--resume", resume]
    if weights is not None:
        command += ["--from-weights", weights.place, *(["--weights", weights.kind] if weights.kind else [])]
    return launch_or_join(recipe.engine.num_ranks, be_a_rank, command)
