"""What an engine is: a model spread over ranks, trained and stored by parameter name.

An engine knows nothing of the model beyond "these are the blocks" (`model.blocks`). Everything that outlives a
process (weights, moments, averages) it shows as `Shard`s: contiguous ranges of flattened fp32 tensors. FSDP2's dim-0
shards, ZeRO-3's partitions and whole tensors are all of that form, so averages and checkpoints are written once for
every engine. The ranges of all ranks cover a parameter; under HSDP every replica has the same ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megadit import optimizers
from megadit.distributed import Topology
from megadit.objectives import Losses
from megadit.optimizers import OptimizerConfig, Slots
from megadit.parametrization.groups import param_groups
from megadit.parametrization.initialisation import initial_value
from megadit.parametrization.spec import ParamSpec

# Runs the model on one micro-batch and returns the losses of its samples.
LossClosure = Callable[[nn.Module], Losses]


@dataclass(frozen=True)
class Shard:
    """The contiguous range [offset, offset + values.numel()) of one flattened parameter that this rank owns."""

    shape: torch.Size  # of the whole parameter
    offset: int
    values: Tensor  # fp32, one-dimensional, a view of the engine's master weight; may be empty


@dataclass(frozen=True)
class StepResult:
    """What came of one optimizer step."""

    losses: Losses  # of this rank's samples, detached
    grad_norm: float  # over all ranks, before clipping; the same on every rank
    grad_norms_P: Tensor  # the same of each parameter, fp32 in the order of `shards`
    skipped: bool  # the norm was not finite, so nothing was updated: weights, moments and step count are as before


class Engine(Protocol):
    """A model on this rank's share of the hardware. Every method is called by all ranks together."""

    topology: Topology
    device: torch.device
    model: nn.Module  # as it was built, for looking on: its weights may be sharded
    shards: Mapping[str, Shard]

    def train_step(self, micro_batches: Sequence[LossClosure], lr_factor: float) -> StepResult:
        """One optimizer step on this rank's micro-batches, which are of equal size.

        Learning rates are those of the parameter table times `lr_factor`. Where a loss or a gradient of any rank is
        not finite, neither is the gradient norm, and the update is skipped on every rank alike.
        """
        ...

    def evaluate(self, micro_batch: LossClosure) -> Losses:
        """The losses of one batch, without gradients."""
        ...

    def optimizer_state(self) -> Mapping[str, Slots]:
        """The slots of the optimizer's state by parameter, as views in the layout of `shards`."""
        ...

    def weights_written(self) -> None:
        """Take notice that the values of `shards` were overwritten from outside."""
        ...

    def set_num_steps(self, num_steps: int) -> None:
        """Set the optimizer's step count, from which Adam, for one, corrects the bias of its moments."""
        ...


def squared_norms(gradients: Sequence[Tensor], topology: Topology) -> Tensor:
    """The squared norm over all ranks of each gradient, of which a rank has a range; fp32 [P].

    Each replica adds its own, alike up to rounding. All are added up, and not those of one: on their own, the weights
    of replicas would drift apart.
    """
    return topology.sum(torch.stack(torch._foreach_norm(list(gradients))).square()) / topology.replicate.size


def mean_loss(losses: Losses) -> Tensor:
    """The mean of what training minimises; its gradient is NaN where it is not finite.

    A loss can be infinite and its gradient finite on one rank. This makes the reduced gradient norm tell every rank.
    """
    mean = losses.total_B.mean()
    return mean * (1 + 0 * mean.detach())  # times 1, or times NaN


def materialise(model: nn.Module, device: torch.device, buffer_device: torch.device) -> None:
    """Give the parameters of a model built on the meta device (uninitialised) memory; its buffers keep their values."""
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    set_buffers(model, buffers, buffer_device)


def set_buffers(model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a model's buffers these values, on `device`."""
    meta = [name for name, value in buffers.items() if value.is_meta]
    assert not meta, f"buffers have no values on the meta device: {meta}"
    for name, value in buffers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, value.to(device))


def load_initial_weights(engine: Engine, specs: Sequence[ParamSpec], seed: int) -> None:
    """Compute each parameter's initial value whole, from (seed, name) alone, and keep this rank's range of it."""
    for spec in specs:
        shard = engine.shards[spec.name]
        end = shard.offset + shard.values.numel()
        shard.values.copy_(initial_value(spec, seed).view(-1)[shard.offset : end])
    engine.weights_written()


def build_optimizer(
    parameters: Mapping[str, Tensor], specs: Sequence[ParamSpec], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the named parameters, grouped as the parameter table says."""
    groups = [
        {"params": [parameters[name] for name in group.names], **group.hyperparameters} for group in param_groups(specs)
    ]
    return optimizers.kind_of(config).build(groups, config)


@contextmanager
def replaced_weights(engine: Engine, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the model with other weights, such as an average, and put its own back afterwards."""
    kept = {name: shard.values.clone() for name, shard in engine.shards.items()}
    write_weights(engine, values)
    try:
        yield
    finally:
        write_weights(engine, kept)


def write_weights(engine: Engine, values: Mapping[str, Tensor]) -> None:
    """Overwrite every weight; optimizer state and step count stay."""
    for name, shard in engine.shards.items():
        shard.values.copy_(values[name])
    engine.weights_written()
