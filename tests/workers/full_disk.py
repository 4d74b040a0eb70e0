"""One rank writes a checkpoint, then runs out of space while it writes the next."""

import resource
from pathlib import Path

from megadit import engines
from megadit.distributed import process_group
from megadit.recipe import Recipe
from megadit.training import checkpoint
from megadit.training.ema import Averages


def main(recipe: Recipe, run: Path, full_rank: int) -> str:
    """What the second save says. A limit on the size of files gives a real OSError of the kernel (EFBIG)."""
    with process_group(recipe.engine.kind != "single", num_replicas=recipe.engine.num_replicas) as topology:
        engine = engines.build(recipe, topology)
        saver = checkpoint.Saver(run, recipe, engine, Averages(engine.shards, [0.9]))
        saver.save(images_seen=16, num_steps=1)
        saver.wait()
        if topology.rank == full_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            saver.save(images_seen=32, num_steps=2)
            saver.wait()
        except checkpoint.CheckpointError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return "written"
