"""Training without data: what a machine does with a recipe, where nothing is read from disk or network."""

import gc
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from megadit import engines, objectives
from megadit.distributed import Topology, process_group
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe, parse
from megadit.training.online import encoder_dtype
from megadit.training.peak_memory import reset_peak
from megadit.training.telemetry import Costs, Telemetry

WARMUP_STEPS = 2  # of each setting: memory is taken, kernels are chosen and blocks compiled
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """One row of the table: what the recipe is changed to."""

    micro_batch_size: int  # one micro-batch of each rank is a step
    activation_checkpointing: str | int


@dataclass(frozen=True)
class Measured:
    """A setting and what its steps cost; None where they did not fit into the memory of the GPU."""

    setting: Setting
    costs: Costs | None


def bench(recipe: Recipe, settings: Sequence[Setting], num_steps: int, text_tokens: int | None) -> list[Measured]:
    """Train `num_steps` steps of the recipe's model in each setting. Called by all ranks.

    `text_tokens` is the length of the captions, by default the most that the model takes. Raises ValueError for a
    setting that the recipe refuses.
    """
    with process_group(recipe.engine.kind != "single", num_replicas=recipe.engine.num_replicas) as topology:
        return [
            Measured(setting, _measure(_changed(recipe, setting, topology.size), topology, num_steps, text_tokens))
            for setting in settings
        ]


def _changed(recipe: Recipe, setting: Setting, num_ranks: int) -> Recipe:
    """The recipe with a global batch of one micro-batch for each rank."""
    tree = recipe.model_dump(mode="json")
    batch_size = setting.micro_batch_size * num_ranks
    tree["data"]["num_streams"] = num_ranks
    tree["training"] |= {
        "batch_size": batch_size,
        "micro_batch_size": setting.micro_batch_size,
        "num_images": batch_size,
    }
    tree["engine"] |= {"activation_checkpointing": setting.activation_checkpointing, "num_ranks": num_ranks}
    return parse(tree, f"micro-batch {setting.micro_batch_size}")


def _measure(recipe: Recipe, topology: Topology, num_steps: int, text_tokens: int | None) -> Costs | None:
    with _fresh_memory(topology.device):
        try:
            return _train(recipe, topology, num_steps, text_tokens)
        except torch.OutOfMemoryError:
            if topology.size > 1:  # the others wait for this rank
                raise
            return None


def _train(recipe: Recipe, topology: Topology, num_steps: int, text_tokens: int | None) -> Costs:
    engine = engines.build(recipe, topology)
    objective = objectives.build(recipe.objective, recipe.model, engine.device, encoder_dtype(recipe))
    batch = synthetic_batch(recipe, recipe.training.micro_batch_size or 0, text_tokens, engine.device)
    timestep_B = objective.timesteps(batch.timestep_uniform)
    telemetry = Telemetry(recipe, topology, notice=lambda phase: None)
    loss = telemetry.timed(partial(objective.losses, batch=batch, timestep_B=timestep_B))
    with telemetry.watching_optimizers():
        for step in range(WARMUP_STEPS + num_steps):
            telemetry.begin("forward")
            result = engine.train_step([loss], 1.0)
            assert math.isfinite(result.grad_norm), "noise at the recipe's learning rate diverged"
            telemetry.count(batch)
            if step == WARMUP_STEPS - 1:
                telemetry.take()
        return telemetry.take()


@contextmanager
def _fresh_memory(device: torch.device) -> Iterator[None]:
    """Forget what an earlier setting left, so that each has its own peak."""
    reset_peak(device)
    try:
        yield
    finally:
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
