"""A long run holds no more memory, files and threads than a short one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megadit.recipe import Recipe

NUM_STEPS = 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "fsdp", "zero3"])
def test_nothing_grows(kind: str, run_ranks: Callable, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """With checkpoints, validations and a decoding process on the way, evenly spread."""
    num_ranks = 1 if kind == "single" else 2
    recipe = tiny_recipe(
        f"engine.kind={kind}",
        f"engine.num_ranks={num_ranks}",
        f"training.num_images={16 * NUM_STEPS}",
        "checkpoints.every_images=800",
        "validation.every_images=1600",
        "data.num_workers=1",
    )
    for steps in run_ranks("leak.py", num_ranks, recipe=recipe, run=tmp_path / "run"):
        memory, files, threads = np.array(steps)[-NUM_STEPS:].T
        middle, last = slice(NUM_STEPS // 4, NUM_STEPS // 4 + 75), slice(NUM_STEPS - 75, NUM_STEPS)
        assert memory[last].max() < 1.02 * memory[middle].max()
        assert files[last].max() <= files[middle].max()
        assert threads[last].max() <= threads[middle].max()
