"""The memory of a rank while it trains, from the recipe alone: nothing is allocated and no rank is started."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megadit import optimizers
from megadit.parametrization.table import build_table
from megadit.planning import encoders
from megadit.planning.activations import activations
from megadit.planning.in_flight import FP32_BYTES, Held, Sizes, gathered_for_evaluation, moments_of
from megadit.recipe import Recipe


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moments of a step at which it may hold most.

    Not in it are the context of a GPU, the buffers of NCCL, what fragmentation takes, and the stream of data.
    """

    moments: Mapping[str, tuple[Held, ...]]  # "backward, block 3", "update", "validation", ...

    @property
    def moment(self) -> str:
        """When the device holds most."""
        return max(self.moments, key=lambda name: sum(item.device_bytes for item in self.moments[name]))

    @property
    def items(self) -> tuple[Held, ...]:
        """What is held at that moment; `peak` is the sum over the device."""
        return self.moments[self.moment]

    @property
    def peak(self) -> int:
        """The most that the device holds at once."""
        return self._most(lambda item: item.device_bytes)

    @property
    def host_peak(self) -> int:
        """The most that is held for this rank in the memory of the CPU at once."""
        return self._most(lambda item: item.host_bytes)

    @property
    def total_peak(self) -> int:
        """The most of both together: on a CPU they are one."""
        return self._most(lambda item: item.device_bytes + item.host_bytes)

    def _most(self, size: Callable[[Held], int]) -> int:
        return max(sum(map(size, items)) for items in self.moments.values())


def predict(recipe: Recipe, num_ranks: int, text_tokens: int, on_cpu: bool = False) -> Memory:
    """The memory of each of `num_ranks` ranks for captions of `text_tokens` tokens.

    States lie there all the time: fp32 weights, the slots of the optimizer, averages. `in_flight.py` has what an engine
    holds beside them, `activations.py` finds activations. `on_cpu` is about ranks on processors: what gloo copies is
    added, and nothing is pinned.
    """
    sizes = Sizes.of(recipe, num_ranks, on_cpu)
    micro_batch = recipe.training.micro_batch_size or recipe.training.batch_size // num_ranks
    evaluated = recipe.validation.batch_size if recipe.validation else micro_batch
    kept = activations(recipe, micro_batch, evaluated, text_tokens)
    always = (*_states(sizes), *encoders.weights(recipe, num_ranks), *_staging(sizes))
    batch = _batch_bytes(
        recipe, recipe.training.batch_size // num_ranks if recipe.encoders else micro_batch, text_tokens
    )
    moments = [*moments_of(sizes, kept), *encoders.working(recipe, micro_batch)]
    if recipe.validation:
        moments.append(("validation", _validation(sizes, kept.evaluation)))
    return Memory({name: (*always, Held("batch", batch), *items) for name, items in moments})


def _states(sizes: Sizes) -> list[Held]:
    engine, share = sizes.recipe.engine, sizes.share
    items = [
        sizes.held("weights", share, sizes.offloads),
        sizes.held("optimizer state", _num_slots(sizes) * share, sizes.offloads),
        sizes.held("averages", _num_averages(sizes) * share, sizes.offloads),
    ]
    if engine.kind in ("zero1", "zero2"):
        items.append(Held("weights of the matrix products", sizes.weight_bytes * sizes.total))
        if sizes.offloads:  # on their way to the device
            items.append(Held("buffer for the weights", 0, share * sizes.weight_bytes // FP32_BYTES))
    if engine.kind == "zero3":  # what is gathered is a copy of the share
        copy = share * sizes.weight_bytes // FP32_BYTES
        items.append(sizes.held("weights of the matrix products", copy, engine.cpu_offload == "all"))
    return items


def _staging(sizes: Sizes) -> list[Held]:
    """The checkpoint's copy of this rank's state. Pinned memory comes in powers of two, for each tensor."""
    if not sizes.recipe.checkpoints.asynchronous:
        return []
    copies = 1 + _num_slots(sizes) + _num_averages(sizes)
    if sizes.on_cpu:
        return [Held("copy for the checkpoint", 0, copies * sizes.share)]
    parts = (sizes.part(math.prod(spec.shape)) for spec in build_table(sizes.recipe))
    return [Held("copy for the checkpoint", 0, copies * sum(1 << (part - 1).bit_length() for part in parts))]


def _validation(sizes: Sizes, activation_bytes: int) -> tuple[Held, ...]:
    """A forward pass without gradients, with an average in place of the weights, which are kept meanwhile."""
    gathered = Held("gathered weights", gathered_for_evaluation(sizes))
    items = (gathered, Held("activations", activation_bytes))
    if not _num_averages(sizes):
        return items
    return (
        *items,
        sizes.held("weights that averages stand in for", sizes.share, sizes.offloads),
    )


def _batch_bytes(recipe: Recipe, num_samples: int, text_tokens: int) -> int:
    """Pictures, noise and features of the text, fp32."""
    model = recipe.model
    text, pooled = model.conditions.text_dim or 0, model.conditions.pooled_dim or 0
    return FP32_BYTES * num_samples * (2 * model.in_channels * model.input_size**2 + text_tokens * text + pooled)


def _num_slots(sizes: Sizes) -> int:
    return len(optimizers.kind_of(sizes.recipe.optimizer).slots)


def _num_averages(sizes: Sizes) -> int:
    training = sizes.recipe.training
    return len(training.ema_rates) + len(training.ema_power_stds)
