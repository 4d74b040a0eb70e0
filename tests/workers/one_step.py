"""One rank takes a real step: the collectives that it asks for, and its peak of memory by torch's tracker."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadit import engines, objectives
from megadit.batch import TENSORS
from megadit.distributed import Topology, process_group
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe
from megadit.training import trainer

TEXT_TOKENS = 5
Found = Counter[tuple[str, int, int]]  # (operation, bytes of its largest tensor, ranks of its group) -> calls


class Count(TorchDispatchMode):
    """Counts what goes to the process group."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Found = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        if func.namespace == "c10d":
            group = next(torch.distributed.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.found[func.__name__.split(".")[0], max(sizes), group.size()] += 1
        return func(*args, **kwargs or {})


def main(recipes: list[Recipe], with_memory: bool = False, run: Path | None = None) -> list[tuple[Found, int]]:
    """Of a step of each recipe; where there is a `run`, of all of the first recipe's training."""
    if run is not None:
        with Count() as counted:
            trainer.train(recipes[0], run)
        return [(counted.found, 0)]
    with process_group(needed=True) as topology:
        return [_step(recipe, topology, with_memory) for recipe in recipes]


def _step(recipe: Recipe, every: Topology, with_memory: bool) -> tuple[Found, int]:
    num_replicas = recipe.engine.num_replicas
    rank, num_shards = every.rank, every.size // num_replicas
    axis = type(every.shard)
    topology = Topology(axis(rank // num_shards, num_replicas), axis(rank % num_shards, num_shards), joined=True)
    engine = engines.build(recipe, topology)
    objective = objectives.build(recipe.objective, recipe.model, engine.device)
    samples = recipe.training.batch_size // every.size
    size = recipe.training.micro_batch_size or samples
    batch = synthetic_batch(recipe, size, TEXT_TOKENS, engine.device)
    loss = partial(objective.losses, batch=batch, timestep_B=objective.timesteps(batch.timestep_uniform))
    with Count() as counted:
        engine.train_step([loss] * (samples // size), 1.0)
    if not with_memory:
        return counted.found, 0
    tracker, state = MemTracker(), engine.optimizer_state()
    columns = [getattr(batch, name) for name in TENSORS]
    tracker.track_external(engine.model, *[slot for slots in state.values() for slot in slots.values()], *columns)
    with tracker:
        engine.train_step([loss], 1.0)
    return counted.found, tracker.get_tracker_snapshot("peak")[engine.device]["Total"]
