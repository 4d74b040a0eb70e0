"""DeepSpeed ZeRO-1, -2 and -3 with the recipe's optimizer, our own schedule and our own checkpoints.

DeepSpeed's schedulers rewrite the learning rate of every group, and its ZeRO-3 resharding gives group 0's
hyperparameters to all groups (both measured with 0.19.8), so neither is used: groups come from the parameter table,
the rate of each is set before every step, and state is read and written where DeepSpeed keeps it (`_places`).

ZeRO-1 adds up gradients over ranks after the last micro-batch; ZeRO-2 and -3 after every one, because they never hold
whole gradients. In bf16 all stages compute with bf16 copies of fp32 weights and add up gradients in fp32.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

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
    set_buffers,
    squared_norms,
)
from megadit.engines.blocks import num_parameters_of_blocks, prepare_blocks
from megadit.objectives import Losses
from megadit.optimizers import Slots
from megadit.parametrization.initialisation import set_multipliers
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe

# Several lines a step otherwise: DeepSpeed 0.19 calls collectives by names that torch 2.13 is about to rename.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")

MAX_REDUCED = 500_000_000  # parameters whose gradients are collected before they are reduced: DeepSpeed's default


class ZeroEngine:
    """A model whose moments (stage 1), gradients (2) and weights (3) are partitioned over all ranks."""

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        self.topology = topology
        self.device = topology.device
        _connect(self.device)
        specs = build_table(recipe)
        self._stage = int(recipe.engine.kind.removeprefix("zero"))
        config = _config(recipe, self._stage, topology.size, max(num_parameters_of_blocks(specs).values()))
        self.model = self._build(recipe, config)
        set_multipliers(self.model, specs)
        self._parameters = dict(self.model.named_parameters())
        self._kind = optimizers.kind_of(recipe.optimizer)
        optimizer = build_optimizer(self._parameters, specs, recipe.optimizer)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        find = partial(_place_in_stage_3, rank=topology.rank) if self._stage == 3 else _place_in_stage_1_or_2
        self._places = {name: find(p, self._optimizer) for name, p in self._parameters.items()}
        self.shards: Mapping[str, Shard] = {
            name: Shard(place.shape, place.offset, place.of(place.flat.detach()))
            for name, place in self._places.items()
        }
        load_initial_weights(self, specs, recipe.seed)
        self.set_num_steps(0)

    def _build(self, recipe: Recipe, config: dict[str, Any]) -> nn.Module:
        """The model with uninitialised weights: whole on every rank, but in stage 3, where each layer is partitioned
        as soon as it is made."""
        with torch.device("meta"):
            model = models.build(recipe.model)
        if self._stage == 3:
            buffers = dict(model.named_buffers())
            with deepspeed.zero.Init(config_dict_or_path=config):
                model = models.build(recipe.model)
            # Inside, DeepSpeed rounds what torch.arange and its kin make to the dtype of the weights, and moves nothing
            # but parameters to the device.
            set_buffers(model, buffers, self.device)
        else:
            materialise(model, self.device, self.device)
        prepare_blocks(model, recipe.engine)
        return model

    def train_step(self, micro_batches: Sequence[LossClosure], lr_factor: float) -> StepResult:
        assert len(micro_batches) == self._engine.gradient_accumulation_steps()
        self._engine.train()
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * lr_factor
        parts: list[Losses] = []
        for micro_batch in micro_batches:
            losses = micro_batch(self._engine)
            self._engine.backward(mean_loss(losses))
            parts.append(losses.detach())
            if len(parts) == len(micro_batches):
                squares_P = squared_norms([self._gradient(name) for name in self._parameters], self.topology)
            self._engine.step()  # updates the weights at the last micro-batch, unless the norm is not finite
        norm = float(self._engine.get_global_grad_norm())  # inf, too, where it was NaN
        return StepResult(Losses.cat(parts), norm, squares_P.sqrt(), skipped=not math.isfinite(norm))

    @torch.no_grad()
    def evaluate(self, micro_batch: LossClosure) -> Losses:
        self._engine.eval()
        return micro_batch(self._engine)

    def optimizer_state(self) -> Mapping[str, Slots]:
        states = self._optimizer.optimizer.state
        return {
            name: {slot: place.of(states[place.flat][slot]) for slot in self._kind.slots}
            for name, place in self._places.items()
        }

    def _gradient(self, name: str) -> Tensor:
        """This rank's range of a gradient, after the last backward pass and before the step."""
        parameter, num_elements = self._parameters[name], self._places[name].num_elements
        if self._stage == 3:
            return safe_get_local_grad(parameter).view(-1)[:num_elements]
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None:
            return torch.zeros(0, device=self.device)
        gradient = fragment.get_lp_grad_fragment(parameter._index_in_param_group).float().view(-1)  # type: ignore[attr-defined]
        if gradient.numel() != num_elements:  # in bf16 DeepSpeed keeps whole gradients
            gradient = gradient.narrow(0, fragment.lp_fragment_address.start, num_elements)
        return gradient

    def weights_written(self) -> None:
        """Copy the fp32 master weights to the weights that the forward pass uses, and drop gathered ones."""
        if self._stage < 3:
            self._optimizer.update_lp_params()
            return
        self._engine.empty_partition_cache()
        for name, parameter in self._parameters.items():
            values = self.shards[name].values
            parameter.ds_tensor.data[: values.numel()].copy_(values)  # type: ignore[attr-defined]

    def set_num_steps(self, num_steps: int) -> None:
        for weights in {id(place.flat): place.flat for place in self._places.values()}.values():
            self._kind.set_num_steps(self._optimizer.optimizer.state[weights], weights, num_steps)


def _connect(device: torch.device) -> None:
    """Let DeepSpeed join the process group that is there."""
    if device.type == "cpu":
        # Its shared-memory collectives would be compiled at start, which takes a minute and a compiler; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _config(recipe: Recipe, stage: int, world_size: int, block_size: int) -> dict[str, Any]:
    samples_per_rank = recipe.training.batch_size // world_size
    micro_batch = recipe.training.micro_batch_size or samples_per_rank
    bf16 = recipe.training.precision == "bf16"
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": recipe.training.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": samples_per_rank // micro_batch,
        "gradient_clipping": recipe.optimizer.max_grad_norm or 0.0,  # 0: none
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            # As much at once as FSDP2 holds: the weights of two blocks, the gradients of one. DeepSpeed's own numbers
            # are for large models: smaller ones would be gathered whole, and all their gradients kept whole.
            "reduce_bucket_size": min(block_size, MAX_REDUCED),
            "stage3_prefetch_bucket_size": block_size,
            "stage3_max_live_parameters": 2 * block_size,
            "stage3_max_reuse_distance": block_size,
            "offload_optimizer": offload if recipe.engine.cpu_offload != "none" else None,
            "offload_param": offload if recipe.engine.cpu_offload == "all" else None,
            # its own linear layer costs five times the rounding error (1e-5 instead of 2e-6 over 5 steps in fp32)
            "memory_efficient_linear": False,
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


@dataclass(frozen=True)
class _Place:
    """Where this rank's range of a parameter lies: in which of DeepSpeed's flat fp32 weights, and where in it."""

    shape: torch.Size
    offset: int  # in the flattened parameter
    flat: Tensor
    start: int  # in `flat`
    num_elements: int

    def of(self, flat: Tensor) -> Tensor:
        """The range of `flat`, a tensor in the layout of the weights."""
        return flat[self.start : self.start + self.num_elements]


def _place_in_stage_3(parameter: nn.Parameter, optimizer: Any, rank: int) -> _Place:
    """ZeRO-3 cuts every parameter into equal partitions, the last ones padded."""
    group, start, partition_size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    total = math.prod(parameter.ds_shape)  # type: ignore[attr-defined]
    offset = min(partition_size * rank, total)
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return _Place(parameter.ds_shape, offset, flat, start, min(partition_size, total - offset))  # type: ignore[attr-defined]


def _place_in_stage_1_or_2(parameter: nn.Parameter, optimizer: Any) -> _Place:
    """ZeRO-1 and -2 cut the concatenated parameters of each group, so a rank may have nothing of a parameter."""
    fragment = parameter._hp_mapping  # type: ignore[attr-defined]
    if fragment is None:
        return _Place(parameter.shape, 0, optimizer.optimizer.param_groups[0]["params"][0], 0, 0)
    flat = optimizer.optimizer.param_groups[fragment.param_group_index]["params"][0]
    where, part = fragment.hp_fragment_address, fragment.lp_fragment_address
    return _Place(parameter.shape, part.start, flat, where.start, where.numel)
