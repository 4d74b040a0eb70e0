"""`megadit bench train --sharding`: what sharding costs where there is nothing to share, FSDP2 on one rank.

A step is the objective's forward and backward pass, clip and update on synthetic data. Steps of the plain module and of
FSDP2 alternate; the ratio is the median over pairs.
"""

from functools import partial

from megadit import engines, objectives
from megadit.benchmarks.findings import Table
from megadit.benchmarks.pairs import time_pairs
from megadit.distributed import process_group
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe, parse

TEXT_TOKENS = 16


def bench_sharding(recipe: Recipe, batch_size: int | None, num_pairs: int) -> Table:
    """`batch_size` samples a step, by default the recipe's."""
    size = batch_size or recipe.training.batch_size
    with process_group(needed=True) as topology:
        objective = objectives.build(recipe.objective, recipe.model, topology.device)
        batch = synthetic_batch(recipe, size, TEXT_TOKENS, topology.device)
        loss = partial(objective.losses, batch=batch, timestep_B=objective.timesteps(batch.timestep_uniform))
        plain, sharded = (engines.build(_on_one_rank(recipe, kind), topology) for kind in ("single", "fsdp"))
        pairs = time_pairs(lambda: plain.train_step([loss], 1.0), lambda: sharded.train_step([loss], 1.0), num_pairs)
    return Table(
        title=f"{recipe.name}: {recipe.model.depth} blocks of width {recipe.model.width}, batch {size}, "
        f"{recipe.training.precision}, median of {num_pairs} training steps",
        baseline="time of the plain module",
        rows=[
            {"engine": "plain module", "ms/step": pairs.median_ms(0), "ratio": 1.0},
            {"engine": "FSDP2 on one rank", "ms/step": pairs.median_ms(1), "ratio": pairs.ratio()},
        ],
    )


def _on_one_rank(recipe: Recipe, kind: str) -> Recipe:
    """The recipe on an engine; what is not the same for both is off."""
    tree = recipe.model_dump(mode="json")
    tree["engine"] |= {"kind": kind, "num_ranks": 1, "num_replicas": 1, "cpu_offload": "none"}
    return parse(tree, recipe.name)
