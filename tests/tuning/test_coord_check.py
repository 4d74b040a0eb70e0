"""The coordinate check: flat under muP in every family, steep under the standard parametrization, on every engine."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from megadit.cli import app
from megadit.parametrization import table
from megadit.parametrization.spec import ParamSpec
from megadit.recipe import Recipe
from megadit.tuning import coord_report
from megadit.tuning.coord_check import CoordCheck, coord_check

WIDTHS = [32, 64, 128, 256]
BAND = 0.3
RECIPES = {"dit": "dit-mup-search-cpu", "pixart": "pixart-mup-proxy-cpu", "mmdit": "mmdit-mup-proxy-cpu"}
SMALL = ["training.batch_size=8", "training.num_images=8", "optimizer.lr=2^-8"]
VISIBLE = ["optimizer.lr=2^-7"]  # updates too large by m must be seen in a few steps
SP = ["parametrization.kind=sp", "parametrization.base_width=null"]


@pytest.mark.parametrize("adaln_init", ["paper", "zero"])
@pytest.mark.parametrize("family", RECIPES)
def test_mup_is_flat(twin: Callable[..., Recipe], family: str, adaln_init: str) -> None:
    recipe = twin(RECIPES[family], *SMALL, f"parametrization.adaln_init={adaln_init}")
    check = coord_check(recipe, WIDTHS, num_steps=4, num_seeds=2)
    assert check.passes(BAND), coord_report.verdict(check, BAND)
    assert np.isfinite(check.slopes()[1:]).sum() > 0.6 * check.slopes()[1:].size, "most layers are not idle"


@pytest.mark.parametrize("family", RECIPES)
def test_standard_parametrization_is_far_outside(twin: Callable[..., Recipe], family: str) -> None:
    check = coord_check(twin(RECIPES[family], *SMALL, *SP), WIDTHS, num_steps=4, num_seeds=1)
    slope, step, _ = check.worst()
    assert slope > 3 * BAND
    assert step > 0


def with_hyperparameter(spec: ParamSpec, name: str, factor: float) -> ParamSpec:
    return replace(spec, hyperparameters={**spec.hyperparameters, name: factor * spec.hyperparameters[name]})


BREAKAGES: dict[str, Callable[[ParamSpec], ParamSpec]] = {
    "hidden lr not divided": lambda s: with_hyperparameter(s, "lr", s.width_mult) if s.role == "hidden" else s,
    "readout multiplier 1": lambda s: replace(s, multiplier=1.0),
    "a table initialised as hidden": lambda s: (
        replace(s, init_std=s.init_std * s.width_mult**-0.5) if "embedding_table" in s.name else s
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_rule_is_found(
    twin: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, breakage: str
) -> None:
    recipe = twin("dit-mup-search-cpu", *SMALL, *VISIBLE)
    whole = table.table_of
    monkeypatch.setattr(table, "table_of", lambda *arguments: [BREAKAGES[breakage](spec) for spec in whole(*arguments)])
    request.addfinalizer(table._build.cache_clear)
    table._build.cache_clear()
    check = coord_check(recipe, WIDTHS, num_steps=5, num_seeds=2)
    assert not check.passes(BAND), coord_report.verdict(check, BAND)


def test_the_whole_rules_pass_where_broken_ones_fail(twin: Callable[..., Recipe]) -> None:
    recipe = twin("dit-mup-search-cpu", *SMALL, *VISIBLE)
    check = coord_check(recipe, WIDTHS, num_steps=5, num_seeds=2)
    assert check.passes(BAND), coord_report.verdict(check, BAND)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_engines_agree(twin: Callable[..., Recipe], run_ranks: Callable[..., list[Any]], engine: str) -> None:
    """Not in text layers, whose outputs include padding: how much there is depends on what shares a rank."""
    arguments = {"widths": [32, 64], "num_steps": 3, "num_seeds": 1}
    single = coord_check(twin("dit-mup-search-cpu", *SMALL), **arguments)
    recipe = twin("dit-mup-search-cpu", *SMALL, f"engine.kind={engine}", "engine.num_ranks=2")
    for check in run_ranks("coord_check.py", 2, recipe=recipe, **arguments):
        assert check.layers == single.layers
        np.testing.assert_allclose(check.sizes, single.sizes, rtol=1e-3)


def fabricated(*slopes: float) -> CoordCheck:
    """Layers whose activations are exactly width^slope."""
    sizes = np.array([[[[width**slope for slope in slopes]] * 2] * 3 for width in WIDTHS], dtype=np.float64)
    return CoordCheck(tuple(WIDTHS), tuple(f"layer{i}" for i in range(len(slopes))), sizes)


def test_slopes_are_recovered() -> None:
    check = fabricated(0.0, 1.0, -0.5)
    np.testing.assert_allclose(check.slopes(), [[0, 1, -0.5]] * 2, atol=1e-12)
    assert check.worst() == (pytest.approx(1.0), 0, "layer1")
    assert check.passes(1.01)
    assert not check.passes(0.99)


def test_silent_layers_pass_and_half_silent_or_exploded_ones_do_not() -> None:
    check = fabricated(0.0, 0.1)
    check.sizes[..., 0] = 0
    assert np.isnan(check.slopes()[:, 0]).all()
    assert check.passes(0.2)
    check.sizes[0, :, :, 0] = 1
    assert not check.passes(0.2)
    exploded = fabricated(0.0)
    exploded.sizes[-1] = math.inf
    assert not exploded.passes(0.2)


@pytest.fixture
def recipe_file(twin: Callable[..., Recipe], tmp_path: Path) -> Callable[..., str]:
    def write(name: str, *overrides: str) -> str:
        from megadit.recipe import dump

        path = tmp_path / f"{name}.yaml"
        path.write_text(dump(twin(name, *SMALL, *overrides)))
        return str(path)

    return write


@pytest.mark.parametrize(("name", "code"), [("dit-mup-search-cpu", 0), ("dit-xl2-sp-cpu", 1)])
def test_command(recipe_file: Callable[..., str], tmp_path: Path, name: str, code: int) -> None:
    out = tmp_path / "out"
    arguments = ["coord-check", recipe_file(name), "--widths", "32,128", "--steps", "3", "--seeds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == code
    with Image.open(out / "coord_check.png") as picture:
        assert picture.width > 500
    rows = list(csv.DictReader((out / "coord_check.csv").open()))
    assert {row["step"] for row in rows} == {"0", "1", "2"}
    by_layer = {(row["layer"], row["step"]): row for row in rows}
    final = by_layer["final_layer.linear", "2"]
    expected = math.log(float(final["width 128"]) / float(final["width 32"])) / math.log(4)
    assert float(final["slope"]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("widths", "message"),
    [("64", "at least two widths"), ("64,x", "not whole numbers"), ("64,40", "must be a multiple of head_dim")],
)
def test_bad_widths_are_explained(recipe_file: Callable[..., str], widths: str, message: str) -> None:
    result = CliRunner().invoke(app, ["coord-check", recipe_file("dit-mup-search-cpu"), "--widths", widths])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
