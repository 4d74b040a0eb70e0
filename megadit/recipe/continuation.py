"""Whether a run can go on with another recipe: its past must be the one that this recipe gives.

Free keys may change. A stage that has not begun may be anything, be added and be taken away. Of one that has begun, the
length may change as long as its schedule does not depend on it.
"""

from collections.abc import Iterator
from typing import Any

from megadit.node import FREE
from megadit.recipe.comparison import Differences, differences
from megadit.recipe.schema import Recipe
from megadit.recipe.stages import Stage, plan

LENGTH = "training.num_images"


def require_same_past(there: Recipe, here: Recipe, images_seen: int, place: str) -> Differences:
    """The free keys that differ. Raises ValueError, naming keys and reasons, unless the run of `there` can go on so.

    `images_seen` says where the run is, `place` where it is found.
    """
    refused, free = compare_pasts(there, here, images_seen)
    if refused:
        aside = f" (these are free and were changed, too: {free})" if free else ""
        raise ValueError(
            f"{place} holds a run of another recipe; these keys make it another run: {'; '.join(refused)}{aside}; "
            f"go on with the recipe that it has, or begin anew in another --run"
        )
    return free


def compare_pasts(there: Recipe, here: Recipe, images_seen: int) -> tuple[list[str], Differences]:
    """What keeps a run of `there` that has seen so many images from going on as `here`; the free keys that differ."""
    old, new = plan(there), plan(here)
    begun = [stage for stage in old if stage.number == 0 or stage.first_image < images_seen]
    refused: list[str] = []
    free: dict[str, tuple[Any, Any]] = {}
    for stage in begun:
        if stage.number >= len(new):
            refused.append(f"{stage} has begun, and this recipe does not have it")
            break
        changed = differences(stage.recipe, new[stage.number].recipe)
        prefix = f"stages.{stage.number}." if stage.number else ""
        refused += [f"{prefix}{said}" for said in _refused(stage, new[stage.number], changed, images_seen)]
        for key, pair in changed.free.items():
            free[key if free.get(key, pair) == pair else prefix + key] = pair  # once, where all stages have it
    return refused, Differences(free, dict.fromkeys(free, FREE))


def _refused(old: Stage, new: Stage, changed: Differences, images_seen: int) -> Iterator[str]:
    """What may not differ in a stage that has begun, and why."""
    if old.start_from != new.start_from:
        yield f"start_from: {old.start_from!r} there, {new.start_from!r} now: the stage has begun"
    for key, (there, here) in changed.matter.items():
        said, mark = f"{key}: {there!r} there, {here!r} now", changed.marks[key]
        if key == LENGTH:
            if reason := _length(old, new, images_seen):
                yield f"{said} ({reason})"
        elif mark.in_stage:
            yield f"{said} (add a stage that changes it)"
        else:
            yield f"{said} ({mark.reason})"


def _length(old: Stage, new: Stage, images_seen: int) -> str | None:
    """Why the length of a stage that has begun may not change; None where it may."""
    if images_seen > old.last_image:
        return "the stage is over"
    if old.recipe.optimizer.depends_on_length:
        schedule = old.recipe.optimizer.schedule
        return f"with optimizer.schedule {schedule} the steps so far depend on it; add a stage instead"
    if images_seen > new.last_image:
        return f"{images_seen} images have been seen"
    return None
