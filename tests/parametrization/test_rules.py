"""The rules of the papers by number, the options, and the refusals."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
from torch import nn

from megadit.parametrization import base_shapes
from megadit.parametrization.spec import ParamSpec
from megadit.parametrization.table import build_table, table_of
from megadit.recipe import Recipe, load

MakeRecipe = Callable[..., Recipe]

# PixArt-alpha at width 1152, base width 288: standard deviations measured on the official model (3 digits), with Adam's
# learning rate and weight decay as multiples of the base ones. Name: (std, lr, weight decay).
PIXART = {
    "x_embedder.proj.weight": (0.0415, 1, 1),
    "t_embedder.mlp.0.weight": (0.02, 1, 1),
    "y_embedder.y_proj.fc1.weight": (0.02, 1, 1),
    "blocks.*.scale_shift_table": (0.02, 1, 1),
    "final_layer.scale_shift_table": (0.02, 1, 1),
    "t_embedder.mlp.2.weight": (0.01, 1 / 4, 4),
    "t_block.1.weight": (0.01, 1 / 4, 4),
    "y_embedder.y_proj.fc2.weight": (0.01, 1 / 4, 4),
    "blocks.*.attn.qkv.weight": (0.0208, 1 / 4, 4),
    "blocks.*.cross_attn.q_linear.weight": (0.0295, 1 / 4, 4),
    "blocks.*.attn.proj.weight": (0.0295, 1 / 4, 4),
    "blocks.*.cross_attn.kv_linear.weight": (0.0241, 1 / 4, 4),
    "blocks.*.mlp.fc[12].weight": (0.0186, 1 / 4, 4),
    "blocks.*.cross_attn.proj.weight": (0, 1 / 4, 4),
    "final_layer.linear.weight": (0, 1, 1),
    "*.bias": (0, 1, 1),
}
# DiT at width 1152, base width 288 (DiT/models_mup.py): 1/sqrt(fan_in), the class embedding N(0, 1), the rest 0.
DIT = {
    "x_embedder.proj.weight": (1 / 4, 1, 1),
    "t_embedder.mlp.0.weight": (1 / 16, 1, 1),
    "y_embedder.embedding_table.weight": (1, 1, 1),
    "t_embedder.mlp.2.weight": (1152**-0.5, 1 / 4, 4),
    "blocks.*.mlp.fc2.weight": (4608**-0.5, 1 / 4, 4),
    "blocks.*.weight": (1152**-0.5, 1 / 4, 4),
    "final_layer.adaLN_modulation.1.weight": (1152**-0.5, 1 / 4, 4),
    "final_layer.linear.weight": (0, 1, 1),
    "*.bias": (0, 1, 1),
}


@pytest.mark.parametrize(("name", "expected"), [("pixart-mup", PIXART), ("dit-xl2-mup", DIT)])
def test_tables_of_the_paper(name: str, expected: dict[str, tuple[float, float, float]]) -> None:
    recipe = load(name, ["optimizer.weight_decay=0.03"])
    used = set()
    for spec in build_table(recipe):
        pattern = next(pattern for pattern in expected if fnmatchcase(spec.name, pattern))
        used.add(pattern)
        std, lr, decay = expected[pattern]
        assert spec.init_std == pytest.approx(std, rel=0.006), spec.name
        assert spec.hyperparameters["lr"] == pytest.approx(lr * 2**-10), spec.name
        assert spec.hyperparameters["weight_decay"] == pytest.approx(decay * 0.03), spec.name
        assert spec.multiplier == (1 / 4 if spec.name == "final_layer.linear.weight" else 1), spec.name
    assert used == expected.keys()


def test_standard_pixart_differs_where_the_paper_says() -> None:
    """Positions of the patches and the tables: 0.0811 and 0.0414 at widths 288 and 1152, randn / sqrt(width)."""
    for width, patch_std in ((288, 0.0811), (1152, 0.0414)):
        by_name = {spec.name: spec for spec in build_table(load("pixart-sp", [f"model.width={width}"]))}
        assert by_name["x_embedder.proj.weight"].init_std == pytest.approx(patch_std, rel=0.006)
        assert by_name["blocks.3.scale_shift_table"].init_std == pytest.approx(width**-0.5)


def test_standard_dit_is_adaln_zero() -> None:
    by_name = {spec.name: spec for spec in build_table(load("dit-xl2-sp"))}
    for name, spec in by_name.items():
        if "adaLN" in name or "final_layer" in name:
            assert spec.init == "zero", name
    assert by_name["y_embedder.embedding_table.weight"].init_std == by_name["t_embedder.mlp.2.weight"].init_std == 0.02
    qkv = by_name["blocks.0.attn.qkv.weight"]
    assert (qkv.init, qkv.init_std) == ("uniform", pytest.approx(math.sqrt(2 / (4 * 1152))))


def hidden(specs: list[ParamSpec]) -> list[ParamSpec]:
    found = [spec for spec in specs if spec.role == "hidden"]
    assert {spec.width_mult for spec in found} == {4.0}
    return found


@pytest.mark.parametrize("exponent", [0, 0.5, 1])
def test_decay_exponent(exponent: float) -> None:
    recipe = load("pixart-mup", [f"parametrization.decay_exponent={exponent!r}"])
    specs = build_table(recipe)
    for spec in hidden(specs):
        per_step = spec.hyperparameters["lr"] * spec.hyperparameters["weight_decay"]
        assert per_step == pytest.approx(2**-10 * 0.03 * 4**-exponent)
    assert {spec.hyperparameters["weight_decay"] for spec in specs if spec.role != "hidden"} == {0.03}


def test_scale_eps() -> None:
    specs = build_table(load("pixart-mup", ["parametrization.scale_eps=true"]))
    assert {spec.hyperparameters["eps"] for spec in hidden(specs)} == {1e-10 / 4}
    assert {spec.hyperparameters["eps"] for spec in specs if spec.role != "hidden"} == {1e-10}


def test_options_do_nothing_at_base_width_or_by_default() -> None:
    options = ["parametrization.scale_eps=true", "parametrization.decay_exponent=1"]
    assert build_table(load("pixart-mup-proxy", options)) == build_table(load("pixart-mup-proxy"))
    assert {spec.hyperparameters["eps"] for spec in build_table(load("pixart-mup"))} == {1e-10}


def test_rows_that_are_a_width_are_refused(make_recipe: MakeRecipe) -> None:
    base, delta, target = (nn.Sequential(nn.Embedding(width, 3)) for width in (8, 16, 32))
    with pytest.raises(ValueError, match=r"0\.weight: the rows of a table must not be a width"):
        table_of(target, base_shapes.compare(base, delta), make_recipe())


def test_a_parameter_without_an_initialisation_is_refused(make_recipe: MakeRecipe) -> None:
    base, delta, target = (nn.Sequential(nn.PReLU(width)) for width in (8, 16, 32))
    with pytest.raises(ValueError, match=r"0\.weight: no initialisation is known for it in family pixart"):
        table_of(target, base_shapes.compare(base, delta), make_recipe("pixart"))


@pytest.mark.parametrize("name", ["dit-mup-search", "pixart-mup", "mmdit-18b"])
def test_biases_and_gains_can_be_left_out_of_decay(name: str) -> None:
    decayed, spared = (
        build_table(load(name, ["optimizer.weight_decay=0.1", f"optimizer.decay_vectors={keep}"]))
        for keep in ("true", "false")
    )
    for before, after in zip(decayed, spared, strict=True):
        expected = 0.0 if len(before.shape) == 1 else before.hyperparameters["weight_decay"]
        assert before.hyperparameters["weight_decay"] > 0
        assert after.hyperparameters == {**before.hyperparameters, "weight_decay": expected}, before.name
    assert {spec.name.rsplit(".")[-1] for spec in spared if spec.hyperparameters["weight_decay"] == 0} >= {"bias"}
