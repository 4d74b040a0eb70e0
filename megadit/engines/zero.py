"""DeepSpeed ZeRO-3 with torch's AdamW, our own schedule and our own checkpoints.

DeepSpeed's schedulers rewrite the learning rate of every group, and its ZeRO-3 resharding gives group 0's
hyperparameters to all groups (both measured with 0.19.8), so neither is used: groups come from the parameter table,
the rate of each is set before every step, and state is read and written through DeepSpeed's local-partition interface
(`safe_get_local_*`).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn

from megadit import models
from megadit.engines.base import LossClosure, Shard, adamw, load_initial_weights, process_device, require_finite
from megadit.parametrization.initialisation import set_multipliers
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe

# Several lines a step otherwise: DeepSpeed 0.19 calls collectives by names that torch 2.13 is about to rename.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


class ZeroEngine:
    """A model whose parameters, gradients and moments are partitioned over all ranks by ZeRO stage 3."""

    def __init__(self, recipe: Recipe) -> None:
        self.device = process_device()
        _connect(self.device)
        specs = build_table(recipe)
        config = _config(recipe, dist.get_world_size())
        with deepspeed.zero.Init(config_dict_or_path=config):
            self.model = models.build(recipe.model)
        set_multipliers(self.model, specs)
        self._parameters = dict(self.model.named_parameters())
        optimizer = adamw(self._parameters, specs, recipe.optimizer)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        self.shards: Mapping[str, Shard] = {name: _shard_of(p) for name, p in self._parameters.items()}
        load_initial_weights(self, specs, recipe.seed)
        self.set_num_steps(0)

    def train_step(self, micro_batches: Sequence[LossClosure], lr_factor: float) -> tuple[Tensor, float]:
        assert len(micro_batches) == self._engine.gradient_accumulation_steps()
        self._engine.train()
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * lr_factor
        losses = []
        for micro_batch in micro_batches:
            per_sample_B = micro_batch(self._engine)
            self._engine.backward(per_sample_B.mean())
            self._engine.step()  # updates the weights at the last micro-batch
            losses.append(per_sample_B.detach())
        norm = float(self._engine.get_global_grad_norm())
        require_finite(norm)
        return torch.cat(losses), norm

    @torch.no_grad()
    def evaluate(self, micro_batch: LossClosure) -> Tensor:
        self._engine.eval()
        return micro_batch(self._engine)

    def moments(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        return {
            name: (
                safe_get_local_optimizer_state(p, "exp_avg")[: self.shards[name].values.numel()],
                safe_get_local_optimizer_state(p, "exp_avg_sq")[: self.shards[name].values.numel()],
            )
            for name, p in self._parameters.items()
        }

    def weights_written(self) -> None:
        """Copy the fp32 master weights to the partitions that the forward pass gathers, and drop gathered ones."""
        self._engine.empty_partition_cache()
        for name, parameter in self._parameters.items():
            values = self.shards[name].values
            parameter.ds_tensor.data[: values.numel()].copy_(values)  # type: ignore[attr-defined]

    def set_num_steps(self, num_steps: int) -> None:
        for weights in self._optimizer.fp32_partitioned_groups_flat:
            state = self._optimizer.optimizer.state[weights]
            if not state:  # torch makes the moments at the first step; a checkpoint may need them before
                state["exp_avg"] = torch.zeros_like(weights)
                state["exp_avg_sq"] = torch.zeros_like(weights)
            state["step"] = torch.tensor(float(num_steps), device=self.device)


def _connect(device: torch.device) -> None:
    """Let DeepSpeed join the process group that is there."""
    if device.type == "cpu":
        # Its shared-memory collectives would be compiled at start, which takes a minute and a compiler; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    samples_per_rank = recipe.training.batch_size // world_size
    micro_batch = recipe.training.micro_batch_size or samples_per_rank
    bf16 = recipe.training.precision == "bf16"
    return {
        "train_batch_size": recipe.training.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": samples_per_rank // micro_batch,
        "gradient_clipping": recipe.optimizer.max_grad_norm or 0.0,  # 0: none
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": 3,
            # its own linear layer costs five times the rounding error (1e-5 instead of 2e-6 over 5 steps in fp32)
            "memory_efficient_linear": False,
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _shard_of(parameter: nn.Parameter) -> Shard:
    """This rank's flat range of a parameter, which ZeRO-3 cuts into equal partitions, the last ones padded."""
    partition = safe_get_local_fp32_param(parameter).detach()
    num_elements = math.prod(parameter.ds_shape)  # type: ignore[attr-defined]
    offset = min(partition.numel() * dist.get_rank(), num_elements)
    return Shard(parameter.ds_shape, offset, partition[: num_elements - offset])  # type: ignore[attr-defined]
