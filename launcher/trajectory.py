"""`megadit verify-trajectory`: short runs of one recipe on every engine, one after the other, and their comparison."""

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megadit.launcher.failures import DONE, FAILED
from megadit.launcher.processes import run
from megadit.recipe import load

logger = logging.getLogger(__name__)


def verify_trajectory(
    source: str, overrides: Sequence[str], num_steps: int, names: str | None, tolerance: float
) -> tuple[int, str]:
    """Run `source` with `overrides` for `num_steps` on a single process and on the engines `names`: exit code, table.

    The exit code is 0 where every difference is within `tolerance`, else 1. Raises ValueError for an unknown engine,
    for a recipe that cannot be shared by its ranks, and where a run fails.
    """
    from megadit.training import trajectory

    ways = trajectory.parse_ways(names)
    recipe = load(source, overrides)
    changes = {name: [*overrides, *trajectory.overrides_of(trajectory.WAYS[name], recipe, num_steps)] for name in ways}
    changes["single"] = [*overrides, *trajectory.overrides_of(trajectory.SINGLE, recipe, num_steps)]
    for change in changes.values():
        load(source, change)  # what is wrong with one is said before any has run
    found = {}
    with tempfile.TemporaryDirectory(prefix="megadit-trajectory-") as folder:
        runs = {name: Path(folder) / name for name in changes}
        for name in ("single", *ways):
            logger.info("verify-trajectory: %s", name)
            command = [sys.executable, "-m", "megadit", "train", source, *changes[name], "--run", str(runs[name])]
            if code := run(command, {}):
                raise ValueError(f"the run on {name} ended with exit code {code}")
            if name != "single":
                found[name] = trajectory.compare(runs[name], runs["single"], recipe)
    passed = all(difference.within(tolerance) for difference in found.values())
    return DONE if passed else FAILED, trajectory.table(found, tolerance, num_steps)
