"""FSDP2, HSDP, and the plain single process: all train on this rank's flat fp32 shards.

The optimizer never sees a DTensor. Its parameters are flat views of the local shards, so that one update costs the same
launches on one rank and on many, learning-rate groups come from the parameter table by name, and the single process
is the same code without `fully_shard`.

In bf16, FSDP2 gathers bf16 copies of the fp32 weights and adds up gradients over ranks in fp32; the single process
casts by autocast. The two round in different places, so their curves agree to bf16's precision only.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard as ShardPlacement

from megadit import models, optimizers
from megadit.distributed import Topology
from megadit.engines.base import (
    LossClosure,
    Shard,
    StepResult,
    build_optimizer,
    load_initial_weights,
    materialise,
    mean_loss,
    squared_norms,
)
from megadit.engines.blocks import prepare_blocks
from megadit.objectives import Losses
from megadit.optimizers import Slots
from megadit.parametrization.initialisation import set_multipliers
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe
from megadit.recipe.schema import Engine as EngineSettings


class TorchEngine:
    """A model under `fully_shard` per block (engine.kind fsdp) or as it is (engine.kind single)."""

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        self.topology = topology
        self.device = topology.device
        self._bf16 = recipe.training.precision == "bf16"
        self._sharded = recipe.engine.kind == "fsdp"
        self._keeps_whole_gradients = recipe.engine.accumulation == "whole"
        self._max_grad_norm = recipe.optimizer.max_grad_norm
        specs = build_table(recipe)
        with torch.device("meta"):
            self.model = models.build(recipe.model)
        prepare_blocks(self.model, recipe.engine)
        if self._sharded:
            _shard(self.model, self._bf16, recipe.engine, topology)
        offloaded = recipe.engine.cpu_offload == "all"
        materialise(self.model, torch.device("cpu") if offloaded else self.device, self.device)
        set_multipliers(self.model, specs)

        self._parameters = dict(self.model.named_parameters())
        self.shards: Mapping[str, Shard] = {name: shard_of(p) for name, p in self._parameters.items()}
        load_initial_weights(self, specs, recipe.seed)
        self._leaves = {name: nn.Parameter(shard.values) for name, shard in self.shards.items()}
        self._kind = optimizers.kind_of(recipe.optimizer)
        self._optimizer = build_optimizer(self._leaves, specs, recipe.optimizer)
        self._base_lrs = [group["lr"] for group in self._optimizer.param_groups]
        self.set_num_steps(0)

    def train_step(self, micro_batches: Sequence[LossClosure], lr_factor: float) -> StepResult:
        parts = []
        for index, micro_batch in enumerate(micro_batches):
            if self._sharded:
                self._reduce_after(last=index == len(micro_batches) - 1)
            with self._precision():
                losses = micro_batch(self.model)
            (mean_loss(losses) / len(micro_batches)).backward()
            parts.append(losses.detach())
        gradients = self._hand_over_gradients()
        squares_P = squared_norms(gradients, self.topology)
        norm = math.sqrt(squares_P.sum().item())
        finite = math.isfinite(norm)
        if finite:
            self._update(gradients, norm, lr_factor)
        self._optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        return StepResult(Losses.cat(parts), norm, squares_P.sqrt(), skipped=not finite)

    @torch.no_grad()
    def evaluate(self, micro_batch: LossClosure) -> Losses:
        with self._precision():
            return micro_batch(self.model)

    def optimizer_state(self) -> Mapping[str, Slots]:
        states = self._optimizer.state
        return {name: {slot: states[leaf][slot] for slot in self._kind.slots} for name, leaf in self._leaves.items()}

    def weights_written(self) -> None:
        """Free what is gathered: evaluation leaves the root's weights gathered, and they are stale now."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def set_num_steps(self, num_steps: int) -> None:
        for leaf in self._leaves.values():
            self._kind.set_num_steps(self._optimizer.state[leaf], leaf, num_steps)

    def _reduce_after(self, last: bool) -> None:
        """Say what becomes of the gradients of the next micro-batch.

        The first method sets both, and the second is about the sum over replicas alone: kept as shards, gradients are
        summed over the ranks of a replica after each micro-batch, over replicas after the last one. (FSDPModule, the
        same in torch 2.6 to 2.14.)
        """
        model: Any = self.model
        model.set_requires_gradient_sync(last or not self._keeps_whole_gradients)
        model.set_requires_all_reduce(last)

    def _precision(self) -> AbstractContextManager[None]:
        """FSDP2 casts by its own policy; a plain model casts by autocast. Weights are fp32 either way."""
        if self._bf16 and not self._sharded:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @torch.no_grad()  # DTensor.to_local goes through autograd otherwise, which is slow
    def _hand_over_gradients(self) -> list[Tensor]:
        """Give the optimizer's leaves the gradients of the local shards, and return them."""
        gradients = []
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            self._leaves[name].grad = gradient.reshape(-1)
            gradients.append(gradient.reshape(-1))
        return gradients

    def _update(self, gradients: list[Tensor], norm: float, lr_factor: float) -> None:
        """Clip the gradients to the allowed norm and run the optimizer."""
        if self._max_grad_norm is not None and norm > self._max_grad_norm:
            torch._foreach_mul_(gradients, self._max_grad_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * lr_factor
        self._optimizer.step()


def _shard(model: nn.Module, bf16: bool, settings: EngineSettings, topology: Topology) -> None:
    """Shard every block, then what is left. Reduction is in fp32; inputs (timesteps!) are not cast."""
    offloaded = settings.cpu_offload == "all"
    shard = partial(
        fully_shard,
        mesh=topology.mesh,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None,
            reduce_dtype=torch.float32 if bf16 else None,
            cast_forward_inputs=False,
        ),
        offload_policy=CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offloaded else OffloadPolicy(),
    )
    for block in model.blocks:  # type: ignore[union-attr]
        shard(block, reshard_after_forward=settings.reshard_after_forward)
    shard(model)


def shard_of(parameter: nn.Parameter) -> Shard:
    """This rank's flat range of a parameter, which FSDP2 cuts along its first dimension."""
    if not isinstance(parameter, DTensor):
        return Shard(parameter.shape, 0, parameter.detach().view(-1))
    mesh = parameter.device_mesh
    assert parameter.placements[-1] == ShardPlacement(0), parameter.placements
    local = parameter.to_local().detach()
    rows_per_rank = math.ceil(parameter.shape[0] / mesh.size(mesh.ndim - 1))
    first_row = min(rows_per_rank * mesh.get_local_rank(mesh.ndim - 1), parameter.shape[0])
    return Shard(parameter.shape, first_row * math.prod(parameter.shape[1:]), local.view(-1))
