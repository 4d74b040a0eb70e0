"""A trial's value and divergence, from its curve."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from megadit.recipe import Recipe
from megadit.tuning.curve import Curve, find_divergence, full_name


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    """20 steps, of which the first 4 warm up."""
    return tiny_recipe()


def write(run: Path, losses: list[float], tail: str = "") -> Path:
    lines = [{"kind": "train", "loss": loss, "velocity": 2 * loss} for loss in losses]
    for weights, loss in VALIDATION:
        numbers = {"metric": "velocity", "loss": loss, "alignment": -loss, "total": 3 * loss}
        lines.append({"kind": "validation", "weights": weights, **numbers})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return run


VALIDATION = [("raw", 9.0), ("ema_0.9", 8.0), ("raw", 7.0), ("ema_0.9", 6.0)]


def test_the_value_is_the_mean_over_the_last_fifth_or_the_last_validation(recipe: Recipe, tmp_path: Path) -> None:
    curve = Curve.read(write(tmp_path, [5.0] * 16 + [1.0, 2.0, 3.0, 4.0]))
    assert curve.value(recipe, "training/loss") == 2.5
    assert curve.value(recipe, "training/velocity") == 5.0
    assert curve.value(recipe, "validation/velocity") == 7.0
    assert curve.value(recipe, "validation/alignment") == -7.0
    assert curve.value(recipe, "validation/loss") == 21.0


def test_a_run_from_before_metrics_had_names_has_the_weighted_sum(recipe: Recipe, tmp_path: Path) -> None:
    lines = [{"kind": "train", "loss": 0.5}] * 20 + [{"kind": "validation", "weights": "raw", "loss": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = Curve.read(tmp_path)
    assert (curve.value(recipe, "training/loss"), curve.value(recipe, "validation/loss")) == (0.5, 0.25)


def test_names_of_metrics(tiny_recipe: Callable[..., Recipe], repa: list[str], twin: Callable[..., Recipe]) -> None:
    plain, with_repa = tiny_recipe(), tiny_recipe(*repa)
    assert [full_name(metric, plain) for metric in ("training", "validation")] == [
        "training/velocity",
        "validation/velocity",
    ]
    assert full_name("training", twin("dit-xl2-mup-cpu")) == "training/noise"
    assert full_name("training/alignment", with_repa) == "training/alignment"
    assert full_name("validation/loss", plain) == "validation/loss"
    for metric in ("training/alignment", "test", "training/", "loss", "velocity"):
        message = f"no metric '{metric}': objective.kind flow has training/velocity, training/loss, validation/velocity"
        with pytest.raises(ValueError, match=message):
            full_name(metric, plain)


def test_an_unfinished_run_has_no_value(recipe: Recipe, tmp_path: Path) -> None:
    assert Curve.read(tmp_path) == Curve([], None)
    curve = Curve.read(write(tmp_path, [1.0] * 19, tail='{"kind": "train", "loss": 1'))
    assert len(curve.losses) == 19
    assert curve.value(recipe, "training/loss") is None
    assert curve.value(recipe, "validation/velocity") is None


def test_divergence(recipe: Recipe) -> None:
    assert find_divergence([1.0] * 20, recipe) is None
    assert find_divergence([1.0] * 5 + [1.49] * 15, recipe) is None
    # The mean of 5 steps passes 1.5 with the third of 2.0: 2 * 1 + 3 * 2 = 8 > 7.5.
    found = find_divergence([1.0] * 10 + [2.0] * 10, recipe)
    assert found is not None
    assert (found.step, found.reason) == (13, "the loss is 1.6 over 5 steps, 1 at the first")


def test_a_leap_during_warm_up_is_no_divergence(recipe: Recipe) -> None:
    assert find_divergence([1.0, 50.0, 50.0, 50.0, *[0.9] * 16], recipe) is None


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite(recipe: Recipe, loss: float, tmp_path: Path) -> None:
    found = find_divergence(Curve.read(write(tmp_path, [1.0, loss, 1.0])).losses, recipe)
    assert found is not None
    assert (found.step, found.reason) == (2, f"the loss is {loss}")


@settings(max_examples=200)
@given(losses=st.lists(st.floats(0.1, 3.0) | st.just(math.inf), min_size=20, max_size=20), seen=st.integers(0, 20))
def test_what_is_found_while_a_curve_grows_is_found_at_its_end(recipe: Recipe, losses: list[float], seen: int) -> None:
    early, late = find_divergence(losses[:seen], recipe), find_divergence(losses, recipe)
    assert early is None or early == late
    assert late is None or late.step > seen or early == late
