"""`megadit coord-check`: start the local ranks of a recipe, or be one of them; rank 0 writes and judges."""

import logging
from collections.abc import Sequence
from pathlib import Path

from megadit.launcher.environment import detect, export
from megadit.launcher.failures import DONE, FAILED
from megadit.launcher.local import launch
from megadit.launcher.processes import follow_parent
from megadit.recipe import load

logger = logging.getLogger(__name__)


def coord_check(
    source: str, overrides: Sequence[str], widths: str, num_steps: int, num_seeds: int, band: float, out: Path | None
) -> int:
    """Check the recipe `source` with `overrides`; write coord_check.png and .csv to `out` (default: runs/NAME-coord).

    Returns 0 where every |slope| is at most `band`, else 1. Raises ValueError for widths that cannot be used.
    """
    follow_parent()
    recipe = load(source, overrides)
    out = out or Path("runs") / f"{recipe.name}-coord"
    ranks = detect()
    if not ranks.launched and recipe.engine.num_ranks > 1:
        settings = {"widths": widths, "steps": num_steps, "seeds": num_seeds, "band": band, "out": out}
        options = [f"--{name}={value}" for name, value in settings.items()]
        return launch(recipe.engine.num_ranks, ["-m", "megadit", "coord-check", source, *overrides, *options])
    if ranks.launched:
        export(ranks)
    from megadit.tuning import coord_check as checks, coord_report

    check = checks.coord_check(recipe, checks.parse_widths(widths), num_steps, num_seeds)
    if ranks.launched and ranks.rank != 0:
        return DONE
    logger.info(coord_report.write(check, band, recipe, out))
    return DONE if check.passes(band) else FAILED
