"""The numbers of a run by name: what is compared is not what is minimised."""

import math
from collections.abc import Callable

import pytest

from megadit import engines, objectives
from megadit.distributed import ALONE
from megadit.recipe import Recipe
from megadit.training.validation import ValidationLoss, validate

SHORT = ("training.num_images=48", "checkpoints.every_images=48", "validation.every_images=48")


def test_every_metric_is_logged_by_its_name(
    train: Callable, tiny_recipe: Callable[..., Recipe], repa: list[str]
) -> None:
    run = train(tiny_recipe(*repa, *SHORT))
    assert len(run.lines("train")) == 3
    for line in run.lines("train"):
        assert line["loss"] == pytest.approx(line["velocity"] + 0.25 * line["alignment"], rel=1e-6)
        assert -1 <= line["alignment"] < line["velocity"]
    for line in run.lines("validation"):
        assert line["metric"] == "velocity"
        assert line["total"] == pytest.approx(line["loss"] + 0.25 * line["alignment"], rel=1e-6)
        assert math.fsum(line["loss_strata"]) / 2 == pytest.approx(line["loss"])


def test_a_loss_of_one_metric_is_that_metric(reference: Callable) -> None:
    assert all(line["loss"] == line["velocity"] for line in reference.lines("train"))
    assert all(line["total"] == line["loss"] for line in reference.lines("validation"))


def test_the_validation_loss_does_not_depend_on_weights_of_the_sum(
    tiny_recipe: Callable[..., Recipe], repa: list[str]
) -> None:
    def initial(weight: float) -> ValidationLoss:
        recipe = tiny_recipe(*repa, f"objective.repa.weight={weight}")
        engine = engines.build(recipe, ALONE)
        return validate(engine, objectives.build(recipe.objective, recipe.model, engine.device), recipe)

    light, heavy = initial(0.1), initial(2.0)
    assert (light.loss, light.loss_strata, light.others) == (heavy.loss, heavy.loss_strata, heavy.others)
    alignment = light.others["alignment"]
    assert heavy.total - light.total == pytest.approx(1.9 * alignment, abs=1e-6)
    assert abs(alignment) > 1e-3
