"""What an engine holds for a part of a step beside its states: gathered weights, gradients, copies, activations.

Each generator yields the moments of a step at which a rank may hold most, and what it holds then. They follow the
sources of FSDP2 (torch 2.13, torch/distributed/fsdp/_fully_shard) and DeepSpeed 0.19.8 (runtime/zero), and are
compared with measured ranks by `megadit bench memory`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megadit.engines.blocks import num_parameters_of_blocks
from megadit.parametrization.table import build_table
from megadit.planning.activations import Activations
from megadit.recipe import Recipe

FP32_BYTES = 4
MAX_REDUCED = 500_000_000  # gradients that DeepSpeed reduces at once, at most: its reduce_bucket_size
MAX_UPDATED = 1_000_000_000  # parameters that ZeRO-3 updates at once: its sub_group_size


@dataclass(frozen=True)
class Held:
    """What a rank holds of one kind."""

    name: str
    device_bytes: int
    host_bytes: int = 0


Moment = tuple[str, tuple[Held, ...]]


@dataclass(frozen=True)
class Sizes:
    """What the generators need to know; blocks are counted in parameters, in their order."""

    recipe: Recipe
    num_shards: int
    accumulates: bool
    blocks: tuple[int, ...]
    rest: int  # parameters that belong to no block
    on_cpu: bool  # gloo copies what it communicates

    @staticmethod
    def of(recipe: Recipe, num_ranks: int, on_cpu: bool) -> "Sizes":
        engine, training = recipe.engine, recipe.training
        sizes = num_parameters_of_blocks(build_table(recipe))
        rest = sizes.pop("", 0)
        num_shards = 1 if engine.kind == "single" else num_ranks // engine.num_replicas
        micro_batch = training.micro_batch_size or training.batch_size // num_ranks
        accumulates = micro_batch * num_ranks < training.batch_size
        return Sizes(recipe, num_shards, accumulates, tuple(sizes.values()), rest, on_cpu)

    @cached_property
    def total(self) -> int:
        return sum(self.blocks) + self.rest

    @property
    def share(self) -> int:
        """fp32 bytes of this rank's part of all parameters."""
        return self.part(self.total)

    def part(self, num_parameters: int) -> int:
        """fp32 bytes of this rank's part of so many."""
        return FP32_BYTES * -(-num_parameters // self.num_shards)

    @property
    def weight_bytes(self) -> int:
        """Of one weight as matrix products take it."""
        return 2 if self.recipe.training.precision == "bf16" else FP32_BYTES

    @property
    def offloads(self) -> bool:
        """Whether the fp32 weights, the optimizer's state and the averages are in the memory of the CPU."""
        return self.recipe.engine.cpu_offload != "none"

    @property
    def copied(self) -> int:
        """Bytes that gloo takes for each fp32 number while it communicates."""
        return FP32_BYTES if self.on_cpu and self.num_shards > 1 else 0

    @property
    def bucket(self) -> int:
        """Parameters whose gradients DeepSpeed reduces at once."""
        return min(max(self.blocks), MAX_REDUCED)

    def backward(self, kept: Activations) -> Iterator[tuple[int, Held, int]]:
        """The backward passes of the blocks, the last first: number, activations, and parameters of those before it."""
        done = 0
        for index in reversed(range(len(self.blocks))):
            gone = (len(self.blocks) - 1 - index) * kept.block
            yield index, Held("activations", kept.training - gone), done
            done += self.blocks[index]

    @staticmethod
    def held(name: str, num_bytes: int, offloaded: bool) -> Held:
        return Held(name, 0, num_bytes) if offloaded else Held(name, num_bytes)


def moments_of(sizes: Sizes, kept: Activations) -> Iterator[Moment]:
    """The moments of a step, by the engine and the precision of the recipe."""
    kind, bf16 = sizes.recipe.engine.kind, sizes.weight_bytes < FP32_BYTES
    if kind == "single":
        return _single(sizes, kept)
    if kind == "fsdp":
        return _fsdp(sizes, kept)
    if kind == "zero3":
        return _zero3(sizes, kept)
    if kind == "zero2":
        return _zero2(sizes, kept)
    return _zero1_bf16(sizes, kept) if bf16 and not sizes.offloads else _zero1(sizes, kept)


def gathered_for_evaluation(sizes: Sizes) -> int:
    """Bytes of whole weights beside those that lie there, where averages take their place and go forward."""
    engine = sizes.recipe.engine
    if engine.kind in ("single", "zero1", "zero2"):
        return sizes.weight_bytes * sizes.total if sizes.copied else 0  # gloo's copy, as weights are handed on
    whole = engine.kind == "fsdp" and not engine.reshard_after_forward
    return sizes.weight_bytes * (sizes.total if whole else 2 * max(sizes.blocks) + sizes.rest)


def _single(sizes: Sizes, kept: Activations) -> Iterator[Moment]:
    for index, activations, done in sizes.backward(kept):
        there = sizes.total if sizes.accumulates else done + sizes.blocks[index] + sizes.rest
        yield f"backward, block {index}", (Held("gradients", FP32_BYTES * there), activations)
    yield "update", (Held("gradients", sizes.share),)


def _fsdp(sizes: Sizes, kept: Activations) -> Iterator[Moment]:
    """In the backward pass of a block: its weights and the next's, its gradients, and those of the one before, which
    are being reduced in fp32. What belongs to no block stays gathered from the forward pass on.
    """
    engine, width = sizes.recipe.engine, sizes.weight_bytes
    offloaded = engine.cpu_offload == "all"
    whole = sizes.accumulates and engine.accumulation == "whole"
    reduced = 0
    for index, activations, done in sizes.backward(kept):
        block = sizes.blocks[index]
        if not engine.reshard_after_forward:
            gathered = sum(sizes.blocks[: index + 1])
        else:
            # A single rank has nothing to gather, so nothing is fetched ahead.
            gathered = block + (sizes.blocks[index - 1] if index and sizes.num_shards > 1 else 0)
        if whole:
            gradients = Held("gradients", FP32_BYTES * sizes.total)
            working = width * block
        else:
            gradients = sizes.held("gradients", sizes.share if sizes.accumulates else sizes.part(done), offloaded)
            working = width * (block + sizes.rest) + FP32_BYTES * reduced
            working += sizes.part(block) if sizes.accumulates else 0
        yield (
            f"backward, block {index}",
            (
                gradients,
                Held("gathered weights", width * (gathered + sizes.rest)),
                Held("gradients in flight", working),
                activations,
            ),
        )
        reduced = block
    last = (
        Held("gathered weights", width * sizes.rest),
        Held("gradients in flight", (width + FP32_BYTES) * sizes.rest),
    )
    yield "end of the backward pass", (sizes.held("gradients", sizes.share, offloaded), *last)


def _zero1(sizes: Sizes, kept: Activations) -> Iterator[Moment]:
    """Gradients stay whole until the last micro-batch; then a rank's part of them is copied twice."""
    bucket = Held("gradients in flight", FP32_BYTES * sizes.bucket)
    for index, activations, done in sizes.backward(kept):
        there = sizes.total if sizes.accumulates else done + sizes.blocks[index] + sizes.rest
        gradients = Held("gradients", FP32_BYTES * there)
        yield f"backward, block {index}", (gradients, *_on_host(sizes), bucket, activations)
    yield from _update(sizes, 2 * sizes.share)


def _zero1_bf16(sizes: Sizes, kept: Activations) -> Iterator[Moment]:
    """DeepSpeed's BF16_Optimizer: whole fp32 gradients always, those in bf16 beside them, and a copy to reduce."""
    gradients = Held("gradients", FP32_BYTES * sizes.total)
    half = Held("gradients in bf16", sizes.weight_bytes * sizes.total)
    for index, activations, _ in sizes.backward(kept):
        yield f"backward, block {index}", (gradients, half, activations)
    copied = FP32_BYTES * min(sizes.total, MAX_REDUCED)
    yield "reduction", (gradients, half, Held("gradients in flight", copied))


def _zero2(sizes: Sizes, kept: Activations) -> Iterator[Moment]:
    """A bucket of gradients is reduced at once: from bf16 by way of copies in fp32 and back."""
    fp32 = sizes.weight_bytes == FP32_BYTES
    copies = 2 if fp32 and sizes.accumulates else 1  # in fp32, what has been added up and what is to be added
    width = FP32_BYTES if fp32 else 2 * sizes.weight_bytes + FP32_BYTES
    bucket = Held("gradients in flight", (width + sizes.copied) * sizes.bucket)
    for index, activations, done in sizes.backward(kept):
        there = copies * sizes.share if done or sizes.accumulates else 0  # taken whole by the first bucket
        yield f"backward, block {index}", (_partition(sizes, there), bucket, activations)
    yield from _update(sizes, (2 if fp32 else 1) * sizes.share)


def _zero3(sizes: Sizes, kept: Activations) -> Iterator[Moment]:
    """Weights of two blocks and of one more that is fetched ahead; gradients of a block as they come, where that is in
    bf16, in the bucket, and in the order of the ranks that they go to. The shards of gradients lie there all the time.
    """
    largest, width = max(sizes.blocks), sizes.weight_bytes
    copied = sizes.copied * width // FP32_BYTES
    gathered = Held("gathered weights", (3 * width + copied) * largest)
    in_bf16 = width if width < FP32_BYTES else 0
    in_flight = Held("gradients in flight", (2 * FP32_BYTES + in_bf16 + sizes.copied) * largest)
    for index, activations, _ in sizes.backward(kept):
        yield f"backward, block {index}", (_partition(sizes, sizes.share), gathered, in_flight, activations)
    yield from _update(sizes, sizes.share + min(sizes.share, FP32_BYTES * MAX_UPDATED))


def _update(sizes: Sizes, gradient_bytes: int) -> Iterator[Moment]:
    yield "update", (_partition(sizes, gradient_bytes),)
    if sizes.copied and sizes.recipe.engine.kind != "zero3":
        copy = Held("the collective's copy of the weights", sizes.weight_bytes * sizes.total)
        yield "gathering", (copy, *_on_host(sizes))


def _partition(sizes: Sizes, num_bytes: int) -> Held:
    """This rank's gradients, which are in the memory of the CPU once and for all where the optimizer is."""
    return _on_host(sizes)[0] if sizes.offloads else Held("gradients", num_bytes)


def _on_host(sizes: Sizes) -> tuple[Held, ...]:
    """What has been added up, by ZeRO-3 always and else of several micro-batches, beside what the optimizer takes."""
    if not sizes.offloads:
        return ()
    zero3 = sizes.recipe.engine.kind == "zero3"
    added = sizes.share if zero3 else sizes.share * sizes.weight_bytes // FP32_BYTES if sizes.accumulates else 0
    return (Held("gradients of the optimizer", 0, sizes.share + added),)
