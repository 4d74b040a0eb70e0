"""One rank trains a few steps with each of several recipes, one after the other."""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megadit import engines, objectives
from megadit.batch import Batch
from megadit.data.loading.loader import Loader
from megadit.distributed import Topology, process_group
from megadit.objectives import Losses
from megadit.recipe import Recipe


def main(jobs: list[tuple[Recipe, int | None]], num_steps: int, num_replicas: int = 1) -> list[dict[str, Any]]:
    """For each (recipe, broken step): losses, norms, skipped and state of every step, and collectives of all by name.

    In the broken step the last sample of rank 1 has an infinite loss, whose gradient is finite.
    """
    with process_group(needed=True, num_replicas=num_replicas) as topology:
        return [_train(recipe, num_steps, broken_step, topology) for recipe, broken_step in jobs]


def _train(recipe: Recipe, num_steps: int, broken_step: int | None, topology: Topology) -> dict[str, Any]:
    engine = engines.build(recipe, topology)
    objective = objectives.build(recipe.objective, recipe.model, engine.device)
    data = topology.data
    with_features = recipe.objective.needs_features is not None
    loader = Loader(recipe.data, recipe.seed, recipe.training.batch_size, data.rank, data.size, True, with_features)
    stream = loader.iterate(0)
    found: dict[str, Any] = {"losses": [], "norms": [], "skipped": [], "states": [], "collectives": Counter()}
    for step in range(num_steps):
        batch = next(stream)
        timestep_B = objective.timesteps(batch.timestep_uniform)
        size = recipe.training.micro_batch_size or len(batch)
        breaks = step == broken_step and topology.rank == 1
        closures = [
            partial(_losses, objective=objective, batch=part, timestep_B=part_B, breaks=breaks)
            for part, part_B in zip(batch.split(size), timestep_B.split(size), strict=True)
        ]
        with _Collectives(found["collectives"]):
            result = engine.train_step(closures, 1.0)
        found["losses"].append(result.losses.total_B)
        found["norms"].append(result.grad_norm)
        found["skipped"].append(result.skipped)
        weights = {name: shard.values.clone() for name, shard in engine.shards.items()}
        found["states"].append(
            [
                weights,
                *({n: m[s].clone() for n, m in engine.optimizer_state().items()} for s in ("exp_avg", "exp_avg_sq")),
            ]
        )
    return found


class _Collectives(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self._counts[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def _losses(model: nn.Module, objective: Any, batch: Batch, timestep_B: Tensor, breaks: bool) -> Losses:
    losses: Losses = objective.losses(model, batch, timestep_B)
    last_B = torch.arange(len(batch)) == len(batch) - 1
    return replace(losses, total_B=torch.where(last_B, torch.inf, losses.total_B)) if breaks else losses
