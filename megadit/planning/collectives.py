"""What a rank sends in one optimizer step, by formula: `trace.py` holds it to what the real engine asks for.

A collective's size is that of its largest tensor on a rank: what an all-gather gives, what a reduce-scatter takes.
FSDP2 cuts a parameter along its first dimension into equal parts and sends the padding, too: of 1152 rows on 1024 ranks
each has 2, so 2048 are sent.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megadit.engines.blocks import block_of
from megadit.parametrization.spec import ParamSpec
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
Axis = Literal["shard", "replicate", "all"]  # over the ranks of a replica, over those with the same shards, over all
FP32_BYTES = 4


@dataclass(frozen=True)
class Collective:
    """Calls of one kind, alike in size."""

    kind: Kind
    axis: Axis
    num_calls: int
    num_bytes: int  # of all calls together


# What the trainer adds after each step, in which the ranks agree whether to stop. (Lines of the log add small ones.)
STOP_FLAG = Collective("all_reduce", "all", num_calls=1, num_bytes=8)


def collectives(recipe: Recipe, num_ranks: int) -> list[Collective]:
    """The collectives of one optimizer step of the engine, largest messages first.

    Raises ValueError for an engine that this does not cover.
    """
    kind = recipe.engine.kind
    if kind == "single":
        return []
    if kind != "fsdp":
        raise ValueError(f"the collectives of engine.kind {kind} are DeepSpeed's own; they are known for single, fsdp")
    specs = build_table(recipe)
    calls = _of_fsdp(recipe, specs, num_ranks)
    calls["all_reduce", "all", FP32_BYTES * len(specs)] += 1  # the gradients' norms
    return by_size(calls)


Calls = Counter[tuple[Kind, Axis, int]]  # (kind, axis, bytes of a call) -> calls


def by_size(calls: Calls) -> list[Collective]:
    """The same as a list, largest messages first."""
    ordered = sorted(calls.items(), key=lambda item: (-item[0][2], item[0]))
    return [Collective(kind, axis, number, number * size) for (kind, axis, size), number in ordered]


def _of_fsdp(recipe: Recipe, specs: Iterable[ParamSpec], num_ranks: int) -> Calls:
    """A block is gathered for its forward pass, and for its backward pass unless it was kept; recomputation happens
    there, so checkpointing adds nothing. What belongs to no block is gathered once, and freed after the backward pass.

    Gradients are added up over the shards after each micro-batch, or after the last one (accumulation whole); over
    replicas after the last one either way.
    """
    engine, training = recipe.engine, recipe.training
    num_replicas = engine.num_replicas
    num_shards = num_ranks // num_replicas
    samples = training.batch_size // num_ranks
    num_micro_batches = samples // (training.micro_batch_size or samples)
    num_reductions = num_micro_batches if engine.accumulation == "sharded" else 1
    weight_bytes = 2 if training.precision == "bf16" else FP32_BYTES
    replicas: Axis = "replicate" if num_shards > 1 else "all"
    calls: Calls = Counter()
    for block, size in _padded_sizes(specs, num_shards).items():
        if num_shards > 1:
            passes = 2 if block and engine.reshard_after_forward else 1
            calls["all_gather", "shard", weight_bytes * size] += passes * num_micro_batches
            calls["reduce_scatter", "shard", FP32_BYTES * size] += num_reductions
        if num_replicas > 1:
            calls["all_reduce", replicas, FP32_BYTES * size // num_shards] += 1
    return calls


def _padded_sizes(specs: Iterable[ParamSpec], num_shards: int) -> dict[str, int]:
    """Name of a block ("" for what belongs to none) -> elements of its parameters with the padding of equal shards."""
    sizes: Counter[str] = Counter()
    for spec in specs:
        rows, *rest = spec.shape
        sizes[block_of(spec.name)] += num_shards * math.ceil(rows / num_shards) * math.prod(rest)
    return dict(sizes)
