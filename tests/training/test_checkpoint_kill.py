"""SIGKILL at any step of a write: what is there afterwards is the checkpoint before or the new one, whole."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megadit.recipe import Recipe

STEPS = {  # of the first rank, beside writes, syncs and the removal of single files
    "os.mkdir .partial-images-0000000032",
    "open rank-0.bin",
    "open .metadata",
    "open checkpoint.json",
    "os.rename .partial-images-0000000032",
    "os.rename images-0000000016",
    "shutil.rmtree .partial-images-0000000016",
    "os.rmdir .partial-images-0000000016",
}


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("num_ranks", "victim", "num_others"),
    [
        (1, 0, 3),
        pytest.param(2, 0, 40, marks=pytest.mark.slow),
        pytest.param(2, 1, 40, marks=pytest.mark.slow),
    ],
)
def test_a_rank_killed_at_any_file_operation_loses_nothing(
    num_ranks: int,
    victim: int,
    num_others: int,
    run_ranks: Callable,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe("checkpoints.keep=1", "model.depth=1")
    settings = {"saving_ranks": num_ranks, "victim": victim, "num_others": num_others, "limit_seconds": 900}
    (found,) = run_ranks("killed_writes.py", 1, recipe=recipe, run=tmp_path / "run", **settings)
    operations = [operation for operation, _, _ in found]
    assert victim == 1 or not STEPS - {*operations}
    assert len(operations) >= num_others
    for operation, values, names in found:
        assert values in [(1.0,), (2.0,)], operation
        assert names == ["images-0000000048"], operation  # of the save after the kill: nothing is left over
    is_old = [values == (1.0,) for _, values, _ in found]
    assert is_old == sorted(is_old, reverse=True)  # the new one appears at one moment, and stays
