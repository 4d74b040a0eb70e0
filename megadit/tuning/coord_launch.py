"""`megadit coord-check`: start the local ranks of a recipe, or be one of them; rank 0 writes and judges."""

import logging
from collections.abc import Sequence
from pathlib import Path

from megadit.exit_codes import DONE, FAILED
from megadit.launcher.environment import Ranks
from megadit.launcher.join import launch_or_join
from megadit.recipe import load, one_stage

logger = logging.getLogger(__name__)


def coord_check(
    source: str, overrides: Sequence[str], widths: str, num_steps: int, num_seeds: int, band: float, out: Path | None
) -> int:
    """Check the recipe `source` with `overrides`; write coord_check.png and .csv to `out` (default: runs/NAME-coord).

    Returns 0 where every |slope| is at most `band`, else 1. Raises ValueError for widths that cannot be used.
    """
    recipe = one_stage(load(source, overrides), "megadit coord-check")
    folder = out or Path("runs") / f"{recipe.name}-coord"

    def check_and_judge(ranks: Ranks) -> int:
        from megadit.tuning import coord_check as checks, coord_report

        check = checks.coord_check(recipe, checks.parse_widths(widths), num_steps, num_seeds)
        if ranks.rank != 0:
            return DONE
        logger.info(coord_report.write(check, band, recipe, folder))
        return DONE if check.passes(band) else FAILED

    settings = {"widths": widths, "steps": num_steps, "seeds": num_seeds, "band": band, "out": folder}
    command = ["coord-check", source, *overrides, *(f"--{name}={value}" for name, value in settings.items())]
    return launch_or_join(recipe.engine.num_ranks, check_and_judge, command)
