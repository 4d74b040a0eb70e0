"""Other settings of the same run that a machine can hold: micro-batch, checkpointing, replicas, kept gradients.

Only keys that change no curve are tried. The nearest is the one that changes fewest of them, and of these the fastest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from megadit.planning.machine.assumptions import Assumptions
from megadit.planning.run_plan import Plan, plan
from megadit.recipe import Recipe
from megadit.recipe.schema import Hardware

LEVELS: tuple[Any, ...] = ("none", "selective", 2, "full")
KEYS = (
    "training.micro_batch_size",
    "engine.activation_checkpointing",
    "engine.num_replicas",
    "engine.accumulation",
    "engine.cpu_offload",
    "validation.batch_size",
)


@dataclass(frozen=True)
class Found:
    """A plan without problems, and what is different from the recipe asked for."""

    plan: Plan
    changes: dict[str, Any]  # by dotted key

    @property
    def seconds(self) -> float:
        return self.plan.time.total


def nearest(asked: Plan) -> Found | None:
    """The nearest settings that run on the plan's machine as they should, or else that fit; None where none do.

    What fits and waits for its network is not helped by computing activations again: that stays as it is.
    """
    level = asked.recipe.engine.activation_checkpointing
    found = list(_candidates(asked, (level,) if asked.fits else (level, *LEVELS)))
    if not found:
        return None
    sound = [each for each in found if not each.plan.problems()]
    if not sound:
        return min(found, key=lambda each: each.seconds)
    return min(sound, key=lambda each: (len(each.changes), each.seconds))


def fastest(asked: Plan) -> Found | None:
    """The settings that fit with the shortest step; of those within a hundredth of it, the one that changes least."""
    found = list(_candidates(asked, (asked.recipe.engine.activation_checkpointing, *LEVELS)))
    if not found:
        return None
    best = min(each.seconds for each in found)
    good = [each for each in found if each.seconds <= 1.01 * best]
    return min(good, key=lambda each: (len(each.changes), each.seconds))


def _candidates(asked: Plan, levels: Sequence[Any]) -> Iterator[Found]:
    """Those that fit, each with the largest micro-batch that does. Weights go to the CPU only where nothing fits."""
    recipe, hardware, assumed = asked.recipe, asked.hardware, asked.assumed
    for offload in _offloads(recipe):
        some = False
        for changed in _engines(recipe, hardware, levels):
            if found := _with_largest_micro_batch(recipe, changed | {"cpu_offload": offload}, hardware, assumed):
                some = True
                yield found
        if some:
            return


def _engines(recipe: Recipe, hardware: Hardware, levels: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Settings of the engine to try."""
    ways = ("sharded", "whole") if recipe.engine.kind == "fsdp" else ("sharded",)
    for num_replicas, level, accumulation in product(
        _numbers_of_replicas(recipe, hardware), dict.fromkeys(levels), ways
    ):
        yield {"activation_checkpointing": level, "num_replicas": num_replicas, "accumulation": accumulation}


def _with_largest_micro_batch(
    recipe: Recipe, changed: dict[str, Any], hardware: Hardware, assumed: Assumptions
) -> Found | None:
    engine = recipe.engine.model_copy(update=changed)
    samples = recipe.training.batch_size // hardware.num_gpus
    sizes = [size for size in range(1, samples + 1) if samples % size == 0]
    low, high, found = 0, len(sizes), None
    while low < high:
        middle = (low + high) // 2
        training = recipe.training.model_copy(update={"micro_batch_size": sizes[middle]})
        planned = plan(recipe.model_copy(update={"engine": engine, "training": training}), hardware, assumed)
        if not planned.fits and planned.memory.moment == "validation":
            planned = plan(_validated_in_small(planned.recipe), hardware, assumed)
        if planned.fits:
            low, found = middle + 1, planned
        else:
            high = middle
    return None if found is None else Found(found, _changes(recipe, found.recipe, samples))


def _validated_in_small(recipe: Recipe) -> Recipe:
    """With batches no larger than those that are trained on."""
    assert recipe.validation is not None
    size = min(recipe.validation.batch_size, recipe.training.micro_batch_size or recipe.training.batch_size)
    return recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"batch_size": size})})


def _changes(there: Recipe, here: Recipe, samples: int) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    accumulates = here.training.micro_batch_size != samples
    for key in KEYS:
        section, name = key.split(".")
        old, new = (getattr(getattr(recipe, section), name, None) for recipe in (there, here))
        if name == "micro_batch_size":
            old = old or samples
        if name == "accumulation" and not accumulates:
            continue  # of no effect
        if old != new:
            changes[key] = new
    return changes


def _numbers_of_replicas(recipe: Recipe, hardware: Hardware) -> list[int]:
    """Replicas of one node, of several, or of less than one; without FSDP there are none."""
    if recipe.engine.kind != "fsdp":
        return [1]
    num_gpus, per_node = hardware.num_gpus, hardware.gpus_per_node
    shards = {num_gpus, *(per_node * 2**power for power in range(11)), *(2**power for power in range(1, 4))}
    numbers = {num_gpus // size for size in shards if size <= num_gpus and num_gpus % size == 0}
    return sorted(numbers | {recipe.engine.num_replicas})


def _offloads(recipe: Recipe) -> list[str]:
    last = {"fsdp": ["all"], "zero3": ["optimizer", "all"], "zero1": ["optimizer"], "zero2": ["optimizer"]}
    return list(dict.fromkeys([recipe.engine.cpu_offload, *last.get(recipe.engine.kind, [])]))
