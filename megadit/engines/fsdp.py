"""FSDP2, and the plain single process: both train with torch's AdamW on this rank's flat fp32 shards.

The optimizer never sees a DTensor. Its parameters are flat views of the local shards, so that one update costs the same
launches on one rank and on many, learning-rate groups come from the parameter table by name, and the single process
is the same code without `fully_shard`.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard as ShardPlacement

from megadit import models
from megadit.engines.base import (
    LossClosure,
    Shard,
    adamw,
    load_initial_weights,
    materialise,
    process_device,
    require_finite,
    sum_over_ranks,
)
from megadit.parametrization.initialisation import set_multipliers
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe


class TorchEngine:
    """A model under `fully_shard` per block (engine.kind fsdp) or as it is (engine.kind single)."""

    def __init__(self, recipe: Recipe) -> None:
        self.device = process_device()
        self._bf16 = recipe.training.precision == "bf16"
        self._sharded = recipe.engine.kind == "fsdp"
        self._max_grad_norm = recipe.optimizer.max_grad_norm
        specs = build_table(recipe)
        with torch.device("meta"):
            self.model = models.build(recipe.model)
        if self._sharded:
            _shard(self.model, self._bf16, recipe.engine.reshard_after_forward)
        materialise(self.model, self.device)
        set_multipliers(self.model, specs)

        self._parameters = dict(self.model.named_parameters())
        self.shards: Mapping[str, Shard] = {name: _shard_of(p) for name, p in self._parameters.items()}
        load_initial_weights(self, specs, recipe.seed)
        self._leaves = {name: nn.Parameter(shard.values) for name, shard in self.shards.items()}
        self._optimizer = adamw(self._leaves, specs, recipe.optimizer)
        self._base_lrs = [group["lr"] for group in self._optimizer.param_groups]
        self.set_num_steps(0)

    def train_step(self, micro_batches: Sequence[LossClosure], lr_factor: float) -> tuple[Tensor, float]:
        losses = []
        for index, micro_batch in enumerate(micro_batches):
            if self._sharded:
                self.model.set_requires_gradient_sync(index == len(micro_batches) - 1)  # type: ignore[operator]
            with self._precision():
                per_sample_B = micro_batch(self.model)
            (per_sample_B.mean() / len(micro_batches)).backward()
            losses.append(per_sample_B.detach())
        norm = self._clip()
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * lr_factor
        self._optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return torch.cat(losses), norm

    @torch.no_grad()
    def evaluate(self, micro_batch: LossClosure) -> Tensor:
        with self._precision():
            return micro_batch(self.model)

    def moments(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        states = self._optimizer.state
        return {n: (states[leaf]["exp_avg"], states[leaf]["exp_avg_sq"]) for n, leaf in self._leaves.items()}

    def weights_written(self) -> None:
        """Free what is gathered: evaluation leaves the root's weights gathered, and they are stale now."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def set_num_steps(self, num_steps: int) -> None:
        for leaf in self._leaves.values():
            state = self._optimizer.state[leaf]
            if not state:  # torch makes the moments at the first step; a checkpoint may need them before
                state["exp_avg"] = torch.zeros_like(leaf)
                state["exp_avg_sq"] = torch.zeros_like(leaf)
            state["step"] = torch.tensor(float(num_steps), device=self.device)

    def _precision(self) -> AbstractContextManager[None]:
        """FSDP2 casts by its own policy; a plain model casts by autocast. Weights are fp32 either way."""
        if self._bf16 and not self._sharded:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _clip(self) -> float:
        """Hand the gradients to the optimizer, scaled to at most the allowed global norm; return the norm."""
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            self._leaves[name].grad = gradient.reshape(-1)
        gradients = [leaf.grad for leaf in self._leaves.values() if leaf.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        total = norms.square().sum()
        norm = math.sqrt(sum_over_ranks(total).item() if self._sharded else total.item())
        require_finite(norm)
        if self._max_grad_norm is not None and norm > self._max_grad_norm:
            torch._foreach_mul_(gradients, self._max_grad_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
        return norm


def _shard(model: nn.Module, bf16: bool, reshard_after_forward: bool) -> None:
    """Shard every block, then what is left, over all ranks. Reduction is in fp32; inputs (timesteps!) are not cast."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )
    mesh = dist.init_device_mesh(process_device().type, (dist.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _shard_of(parameter: nn.Parameter) -> Shard:
    """This rank's flat range of a parameter, which FSDP2 cuts along its first dimension."""
    if not isinstance(parameter, DTensor):
        return Shard(parameter.shape, 0, parameter.detach().view(-1))
    assert parameter.placements == (ShardPlacement(0),), parameter.placements
    local = parameter.to_local().detach()
    rows_per_rank = math.ceil(parameter.shape[0] / parameter.device_mesh.size())
    first_row = min(rows_per_rank * parameter.device_mesh.get_local_rank(), parameter.shape[0])
    return Shard(parameter.shape, first_row * math.prod(parameter.shape[1:]), local.view(-1))
