"""What sharding costs where there is nothing to share: FSDP2 on one rank beside the plain module, in one run.

`python -m megadit.training.bench_sharding [RECIPE] [--batch N] [--pairs N]`. A step is the objective's forward and
backward pass, clip and AdamW on synthetic data. Steps of the two engines alternate; the ratio is the median over pairs.
"""

import argparse
import sys
from functools import partial

from megadit import engines, objectives, timing
from megadit.distributed import Topology, process_group
from megadit.recipe import Recipe, load, parse
from megadit.training.synthetic import synthetic_batch

TEXT_TOKENS = 16


def compare(recipe: Recipe, batch_size: int, num_pairs: int, topology: Topology) -> str:
    """The lines that the command prints. Needs a process group of one."""
    device = topology.device
    objective = objectives.build(recipe.objective, recipe.model, device)
    batch = synthetic_batch(recipe, batch_size, TEXT_TOKENS, device)
    loss = partial(objective.losses, batch=batch, timestep_B=objective.timesteps(batch.timestep_uniform))
    plain, sharded = (engines.build(_on_one_rank(recipe, kind), topology) for kind in ("single", "fsdp"))
    pairs = timing.time_pairs(lambda: plain.train_step([loss], 1.0), lambda: sharded.train_step([loss], 1.0), num_pairs)
    return "\n".join(
        [
            f"{recipe.name}: {recipe.model.depth} blocks of width {recipe.model.width}, batch {batch_size}, "
            f"{recipe.training.precision}, median of {num_pairs} training steps, {timing.machine()}",
            f"{'plain module':<24}{pairs.median_ms(0):>10.1f} ms/step",
            f"{'FSDP2 on one rank':<24}{pairs.median_ms(1):>10.1f} ms/step",
            f"FSDP2 takes {pairs.ratio():.3f} times as long",
        ]
    )


def _on_one_rank(recipe: Recipe, kind: str) -> Recipe:
    """The recipe on an engine; what is not the same for both is off."""
    tree = recipe.model_dump(mode="json")
    tree["engine"] |= {"kind": kind, "num_ranks": 1, "num_replicas": 1, "cpu_offload": "none"}
    return parse(tree, recipe.name)


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m megadit.training.bench_sharding", description=__doc__)
    parser.add_argument("recipe", nargs="?", default="quickstart", help="name or path of a recipe")
    parser.add_argument("--batch", type=int, help="samples of a step (default: the recipe's)")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps to time")
    args = parser.parse_args()

    def table() -> str:
        recipe = load(args.recipe)
        with process_group(needed=True) as topology:
            return compare(recipe, args.batch or recipe.training.batch_size, args.pairs, topology)

    return timing.print_table(table)


if __name__ == "__main__":
    sys.exit(main())
