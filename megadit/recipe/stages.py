"""Stages: parts of one run, one after the other, such as 256 pixels and then 512, or a decay of the learning rate.

    stages:
      - name: low                  # what is not changed is that of the top level
      - name: high
        start_from: ema_0.999      # default: everything goes on, moments of the optimizer too
        data: {url: s3://bucket/high/train}
        model: {input_size: 64}
        training: {num_images: 1_000_000, batch_size: 512}

Each entry is merged over the top level (not over the stage before it), and must give a valid recipe. It may change keys
that are marked as of a stage, or free (see `megadit.node`). Schedule and warm-up count from the start of the stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadit.node import UNMARKED
from megadit.recipe.comparison import differences, mark_of
from megadit.recipe.parsing import merge, parse_whole
from megadit.recipe.schema import Recipe
from megadit.recipe.yaml_file import RecipeError

NAME, START_FROM = "name", "start_from"


@dataclass(frozen=True)
class Stage:
    """A part of a run. A recipe without stages is one of a single stage."""

    number: int  # from 0
    name: str
    recipe: Recipe  # as if it were alone; training.num_images is the length of the stage
    start_from: str | None  # "weights" or an average's name: with fresh moments; None: with all of the stage before
    first_image: int  # images seen before it
    first_step: int  # steps before it
    num_stages: int

    @property
    def last_image(self) -> int:
        """Images seen when it ends."""
        return self.first_image + self.recipe.training.num_images

    @property
    def is_last(self) -> bool:
        return self.number == self.num_stages - 1

    def steps(self, images_seen: int) -> int:
        """How many steps the run has made, at a place in this stage."""
        return self.first_step + (images_seen - self.first_image) // self.recipe.training.batch_size

    def __str__(self) -> str:
        return f"stage {self.name} ({self.number + 1} of {self.num_stages})"


def plan(recipe: Recipe, source: str = "recipe") -> tuple[Stage, ...]:
    """The stages of a recipe, in order. Raises RecipeError, led by `source`, for what a stage cannot have."""
    top, found = recipe.model_copy(update={"stages": ()}), list[Stage]()
    given = recipe.stages or ({},)
    for number, changes in enumerate(given):
        name = changes.get(NAME, str(number))
        where = f"{source}: stage {name}"
        if not isinstance(name, str) or name in [stage.name for stage in found]:
            raise RecipeError(f"{source}: stages.{number}.name = {name!r}: must be text, another one for each stage")
        before = found[-1] if found else None
        stage = Stage(
            number=number,
            name=name,
            recipe=_of_stage(top, changes, where) if recipe.stages else top,
            start_from=_start_from(changes, top, before, where),
            first_image=before.last_image if before else 0,
            first_step=before.steps(before.last_image) if before else 0,
            num_stages=len(given),
        )
        found.append(stage)
    return tuple(found)


def format_plan(stages: Sequence[Stage]) -> str:
    """One line for each stage: which images, in how many steps, from which weights, and what it changes."""
    lines = []
    for stage in stages:
        recipe, first = stage.recipe, stages[0].recipe
        changed = [f"{key}={here}" for key, (_, here) in differences(first, recipe).items()]
        lines.append(
            f"{stage}: images {stage.first_image + 1:,} to {stage.last_image:,} in {recipe.num_steps:,} steps of "
            f"{recipe.training.batch_size}{f', from {stage.start_from}' if stage.start_from else ''}"
            f"{': ' if changed else ''}{', '.join(changed)}"
        )
    return "\n".join(lines)


def stages_of(recipe: Recipe) -> tuple[Recipe, ...]:
    """Each stage as a recipe of its own, without `stages`; of a recipe without stages it is (recipe,)."""
    return tuple(stage.recipe for stage in plan(recipe))


def one_stage(recipe: Recipe, command: str) -> Recipe:
    """The recipe. Raises RecipeError where it has stages, which `command` cannot use."""
    if recipe.stages:
        raise RecipeError(
            f"{recipe.name}: {command} takes a recipe of one stage, this one has {len(recipe.stages)}: "
            "stages=[] leaves the top level alone"
        )
    return recipe


def _of_stage(top: Recipe, changes: Mapping[str, Any], where: str) -> Recipe:
    changes = {key: value for key, value in changes.items() if key not in (NAME, START_FROM)}
    tree = top.model_dump(mode="json", exclude={"stages"})
    for key, value in _stated(changes):
        mark, there = mark_of(key, top), _value_at(tree, key)
        if mark is UNMARKED and isinstance(there, Mapping):
            continue  # no section, in the place of one: `parse_whole` says so
        if mark is not None and not mark.in_stage and value != there:
            raise RecipeError(f"{where}: {key} = {value!r}: no stage may change it: {mark.reason}")
    return parse_whole(merge(tree, changes), where)


def _start_from(changes: Mapping[str, Any], top: Recipe, before: Stage | None, where: str) -> str | None:
    value = changes.get(START_FROM)
    if value is None:
        return None
    allowed = ["weights", *top.training.average_names]
    if before is None:
        raise RecipeError(f"{where}: start_from = {value!r}: the first stage has none before it")
    if value not in allowed:
        raise RecipeError(f"{where}: start_from = {value!r}: allowed: {', '.join(allowed)}")
    return str(value)


def _stated(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, down to what is no section."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _stated(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
