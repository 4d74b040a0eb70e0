"""What ships is planned: the tables of docs/planning.md are what the planner says, and recipes fit their machines."""

import runpy
from pathlib import Path

import pytest

from megadit.planning.machine.assumptions import Assumptions
from megadit.planning.run_plan import machine_of, plan
from megadit.recipe import RECIPE_FOLDER, Recipe, load, stages_of

DOCS = Path(__file__).parents[2] / "docs"
SHIPPED = [path.stem for path in sorted(RECIPE_FOLDER.glob("*.yaml"))]
LARGE = [name for name in SHIPPED if load(name).hardware is not None]


def test_the_page_is_up_to_date() -> None:
    """`make plans` writes it."""
    text = (DOCS / "planning.md").read_text()
    assert runpy.run_path(str(DOCS / "plans.py"))["page"](text) == text


def test_recipes_at_full_size_name_a_machine() -> None:
    assert all(name.endswith("-cpu") or name == "quickstart" for name in set(SHIPPED) - set(LARGE))
    assert len(LARGE) >= 20


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_fits_the_machine_that_it_names(name: str) -> None:
    """It does not wait for its network, and is set up as a run of days wants to be."""
    for stage in stages_of(load(name)):
        planned = plan(stage, machine_of(stage, None, None, None), Assumptions())
        assert planned.problems() == []
        size = planned.reading.bytes_per_image
        assert stage.data.num_workers > 0 and stage.data.chunk_samples * size > 4e6
        assert bytes_in_streams(stage, size) < stage.data.memory_mb * 1e6
        assert stage.engine.compile and stage.validation is not None and stage.training.ema_rates


def bytes_in_streams(recipe: Recipe, bytes_per_image: float) -> float:
    """Of a rank: two groups of chunks for each of its streams."""
    assert recipe.hardware is not None
    num_streams = recipe.data.num_streams / recipe.hardware.num_gpus
    return 2 * num_streams * recipe.data.chunks_per_group * recipe.data.chunk_samples * bytes_per_image
