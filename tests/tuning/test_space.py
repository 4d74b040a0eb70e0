"""Search spaces: what a text means, and the points that a grid and a random search take."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from megadit.recipe import Recipe, load
from megadit.tuning.space import draw, grid, paper_space, parse_space, trial_name


def test_a_grid_is_every_combination_in_the_order_of_the_keys() -> None:
    space = parse_space(["model.width=32,64", "optimizer.lr=2^-9..2^-8", "seed=0..1"])
    assert [trial_name(point) for point in grid(space)] == [
        f"width={width},lr=2^{exponent},seed={seed}" for width in (32, 64) for exponent in (-9, -8) for seed in (0, 1)
    ]
    assert grid(space)[0] == ("model.width=32", "optimizer.lr=2^-9", "seed=0")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.lr=2^-2..2^1", ["2^-2", "2^-1", "2^0", "2^1"]),
        ("optimizer.lr=10^-4..10^-3", ["10^-4", "10^-3"]),
        ("optimizer.lr=2^-7.5, 1e-3", ["2^-7.5", "1e-3"]),
        ("optimizer.warmup_steps=0..3", ["0", "1", "2", "3"]),
        ("optimizer.betas=[0.9, 0.99],[0.9,0.95]", ["[0.9, 0.99]", "[0.9,0.95]"]),
        ("optimizer.max_grad_norm=null,1", ["null", "1"]),
    ],
)
def test_values_keep_their_spelling(text: str, values: list[str]) -> None:
    key = text.partition("=")[0]
    assert grid(parse_space([text])) == [(f"{key}={value}",) for value in values]


def test_names_tell_equal_last_parts_apart() -> None:
    point = ("objective.repa.weight=1", "other.weight=2", "model.width=8", "data.url=file:///a b")
    assert trial_name(point) == "repa.weight=1,other.weight=2,width=8,url=file_a_b"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "nothing to search"),
        (["optimizer.lr"], "space 'optimizer.lr' is not of the form"),
        (["optimizer.lr="], "is not of the form"),
        (["seed=1,,2"], "has an empty value"),
        (["seed=1,2,1"], "has a value twice"),
        (["seed=1", "seed=2"], "the space names seed twice"),
        (["optimizer.lr=2^-5..2^-9"], "is empty: a range goes from the smaller"),
        (["seed=3..3"], "is empty"),
        (["optimizer.lr=low..high"], "optimizer.lr: 'low' is no end of a range"),
        (["optimizer.lr=2^-9..0.1"], "'2^-9' is no end of a range"),
        (["optimizer.lr=0.1..inf"], "'inf' is no end of a range"),
        (["optimizer.lr=-0.1..1"], "must not begin below 0"),
    ],
)
def test_unusable_spaces(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_space(texts)


@pytest.mark.parametrize("text", ["optimizer.max_grad_norm=0.1..10", "optimizer.lr=2^-7.5..2^-5"])
def test_some_ranges_have_no_grid(text: str) -> None:
    with pytest.raises(ValueError, match="grid"):
        grid(parse_space([text]))


@given(seed=st.integers(0, 2**63), fewer=st.integers(1, 20), more=st.integers(1, 20))
def test_more_random_points_begin_with_the_fewer(seed: int, fewer: int, more: int) -> None:
    space = parse_space(["optimizer.lr=2^-9..2^-5", "seed=0..3", "model.width=32,64", "optimizer.eps=0.0..1.0"])
    assert draw(space, fewer + more, seed)[:fewer] == draw(space, fewer, seed)


def test_random_points_fill_the_space_evenly() -> None:
    space = parse_space(
        ["optimizer.lr=2^-9..2^-5", "a.int=1..3", "model.width=32,64", "a.log=0.1..10", "a.linear=0.0..2.0"]
    )
    columns = list(zip(*([o.partition("=")[2] for o in point] for point in draw(space, 3000, seed=1)), strict=True))
    exponents = [float(value.removeprefix("2^")) for value in columns[0]]
    ends = {"-9": exponents, "int": [float(v) for v in columns[1]], "linear": [float(v) for v in columns[4]]}
    assert (min(exponents), max(exponents)) == (-9, -5)
    assert (min(ends["linear"]), max(ends["linear"])) == pytest.approx((0, 2), abs=0.01)
    assert sum(exponents) / 3000 == pytest.approx(-7, abs=0.1)
    assert sum(ends["linear"]) / 3000 == pytest.approx(1, abs=0.05)
    assert [columns[1].count(value) for value in "123"] == pytest.approx([1000] * 3, rel=0.1)
    assert [columns[2].count(value) for value in ("32", "64")] == pytest.approx([1500] * 2, rel=0.1)
    logs = [math.log10(float(value)) for value in columns[3]]
    assert (min(logs), max(logs)) == pytest.approx((-1, 1), abs=0.01)
    assert sum(logs) / 3000 == pytest.approx(0, abs=0.05)


def test_the_papers_four_hyperparameters(tiny_recipe: Callable[..., Recipe], tiny_yaml: Path) -> None:
    keys = ["optimizer.lr", "optimizer.max_grad_norm", "objective.repa.weight", "optimizer.warmup_steps"]
    with_repa = ["model.repa={block: 1, feature_dim: 8}", "objective.repa={encoder: /dinov2}"]
    space = parse_space(paper_space(tiny_recipe(*with_repa)))
    assert [dimension.key for dimension in space] == keys
    for point in draw(space, 50, seed=0):
        recipe = load(tiny_yaml, [*with_repa, *point])
        assert 2**-13 <= recipe.optimizer.lr <= 2**-9
        assert recipe.optimizer.warmup_steps <= recipe.num_steps // 10
    without = parse_space(paper_space(tiny_recipe()))
    assert [dimension.key for dimension in without] == [key for key in keys if "repa" not in key]


def test_the_papers_space_of_a_run_too_short_for_a_tenth(tiny_recipe: Callable[..., Recipe]) -> None:
    """It has a warm-up to draw all the same; the command line does not name it, so an error could not be followed."""
    (warmup,) = [line for line in paper_space(tiny_recipe("training.num_images=96")) if "warmup" in line]  # 6 steps
    assert warmup == "optimizer.warmup_steps=0..1"
    parse_space([warmup])
