"""A long run holds no more memory, files and threads than a short one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megadit.recipe import Recipe

NUM_STEPS = 200
WAYS = {kind: (2, f"engine.kind={kind}") for kind in ("fsdp", "zero1", "zero2", "zero3")}
WAYS |= {"single": (1,), "hsdp": (4, "engine.kind=fsdp", "engine.num_replicas=2")}


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_grows(way: str, run_ranks: Callable, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """With checkpoints beside training, validations and a decoding process on the way, evenly spread."""
    num_ranks, *engine = WAYS[way]
    recipe = tiny_recipe(
        *engine,
        f"engine.num_ranks={num_ranks}",
        f"training.num_images={16 * NUM_STEPS}",
        "checkpoints.every_images=800",
        "validation.every_images=1600",
        "data.num_workers=1",
    )
    for steps in run_ranks("leak.py", num_ranks, limit_seconds=900, recipe=recipe, run=tmp_path / "run"):
        memory, files, threads = np.array(steps)[-NUM_STEPS:].T
        middle, last = slice(NUM_STEPS // 4, NUM_STEPS // 4 + 75), slice(NUM_STEPS - 75, NUM_STEPS)
        assert memory[last].max() < 1.02 * memory[middle].max()
        assert files[last].max() <= files[middle].max()
        assert threads[last].max() <= threads[middle].max()
