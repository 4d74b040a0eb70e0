"""Base shapes and the parameter table by themselves: errors, files, the standard parametrization, the printed form."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, strategies as st
from torch import nn

from megadit import models
from megadit.models.layers import Readout
from megadit.parametrization import base_shapes
from megadit.parametrization.groups import param_groups
from megadit.parametrization.initialisation import initial_value, initialise, readout_multipliers, set_multipliers
from megadit.parametrization.spec import ParamSpec
from megadit.parametrization.table import build_table, format_table, table_of, to_rows
from megadit.recipe import Recipe, load

MakeRecipe = Callable[..., Recipe]
QUICKSTART_SHAPES = "mmdit_pixel16_p4_d4_hd32_w128.bsh"


def _two_layers(width: int, last: type[nn.Linear]) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), last(width, 2))


def test_plain_linear_from_width_to_finite_is_refused(make_recipe: MakeRecipe) -> None:
    shapes = base_shapes.compare(_two_layers(8, nn.Linear), _two_layers(16, nn.Linear))
    with pytest.raises(ValueError, match=r"1\.weight: .* must be a Readout"):
        table_of(_two_layers(32, nn.Linear), shapes, make_recipe())
    assert [s.role for s in table_of(_two_layers(32, Readout), shapes, make_recipe()) if len(s.shape) == 2] == [
        "input",
        "output",
    ]


def test_readout_to_a_width_is_refused(make_recipe: MakeRecipe) -> None:
    base, delta, target = (nn.Sequential(Readout(3, width)) for width in (8, 16, 32))
    with pytest.raises(ValueError, match=r"0\.weight: a Readout must not map to a width"):
        table_of(target, base_shapes.compare(base, delta), make_recipe())


def test_parameter_without_a_role_is_refused(make_recipe: MakeRecipe) -> None:
    base, delta, target = (nn.Sequential(nn.Conv1d(3, width, 2)) for width in (8, 16, 32))
    with pytest.raises(ValueError, match=r"0\.weight: no role is known"):
        table_of(target, base_shapes.compare(base, delta), make_recipe())


def test_base_equal_to_delta_is_refused() -> None:
    with pytest.raises(ValueError, match="no dimension is a width"):
        base_shapes.compare(_two_layers(8, Readout), _two_layers(8, Readout))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [null]\nb: [null, null]\n", "no dimension is a width"),
        ("- 1\n", "maps parameter names"),
        ("", "maps parameter names"),
        ("a: 3\n", "a: 3 is not a list"),
        ("a: [8, x]\n", "is not a list of positive integers and null"),
        ("a: [0]\n", "is not a list of positive integers and null"),
        ("a: [1\n", "not valid YAML"),
    ],
)
def test_broken_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.bsh"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        base_shapes.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "extra", "rank"])
def test_file_of_another_model_is_refused(make_recipe: MakeRecipe, tmp_path: Path, change: str) -> None:
    path = tmp_path / "other.bsh"
    base_shapes.make(make_recipe(), path)
    tree = yaml.safe_load(path.read_text())
    if change == "missing":
        del tree["blocks.0.image.qkv.weight"]
    elif change == "extra":
        tree["blocks.0.image.qkv.weight2"] = [16]
    else:
        tree["blocks.0.image.qkv.weight"] = [16]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"blocks\.0\.image\.qkv\.weight"):
        build_table(make_recipe(parametrization={"base_width": None, "base_shapes": str(path)}))


def test_unknown_file_names_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=QUICKSTART_SHAPES):
        base_shapes.resolve("no_such_shapes")
    assert base_shapes.resolve(QUICKSTART_SHAPES) == base_shapes.resolve(QUICKSTART_SHAPES.removesuffix(".bsh"))


def test_shipped_file_is_what_make_writes(tmp_path: Path) -> None:
    recipe = load("quickstart", ["parametrization.base_shapes=null", "parametrization.base_width=128"])
    base_shapes.make(recipe, tmp_path / "made.bsh")
    assert (tmp_path / "made.bsh").read_text() == base_shapes.resolve(QUICKSTART_SHAPES).read_text()


def test_make_needs_a_base_width(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set parametrization\.base_width=WIDTH"):
        base_shapes.make(make_recipe(parametrization={"kind": "sp", "base_width": None}), tmp_path / "x.bsh")
    assert not (tmp_path / "x.bsh").exists()


def test_base_width_needs_whole_heads(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match="base_width 20 must be a multiple of model.head_dim 8"):
        build_table(make_recipe(parametrization={"base_width": 20}))


def test_18b_table_allocates_nothing(make_recipe: MakeRecipe) -> None:
    model = {"width": 5120, "depth": 19, "head_dim": 128, "input_size": 32, "text_dim": 4096, "pooled_dim": 4096}
    specs = build_table(make_recipe(model=model, parametrization={"base_width": 512}))
    # 36 width^2 per block, as published for this ladder; the text stream of the last block is smaller
    assert sum(math.prod(s.shape) for s in specs) == pytest.approx(36 * 19 * 5120**2, rel=0.02)
    assert {s.width_mult for s in specs if s.role in ("hidden", "output")} == {10.0}


def test_standard_parametrization(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(parametrization={"kind": "sp", "base_width": None, "output_mult": 2.0})
    specs = build_table(recipe)
    assert {s.role for s in specs} == {"finite", "vector", "output"}
    assert {(*s.hyperparameters.values(), s.width_mult) for s in specs} == {(2.0**-6, 0.1, 1e-8, 1.0)}
    assert len(param_groups(specs)) == 1
    assert readout_multipliers(specs) == {"readout": 2.0}
    by_name = {s.name: s for s in specs}
    for name in ("readout.weight", "final_modulation.weight", "blocks.0.text.modulation.weight", "text_embed.bias"):
        assert not initial_value(by_name[name], 0).any()
    drawn = initial_value(by_name["blocks.0.image.mlp.fc1.weight"], 0)
    bound = math.sqrt(6 / (64 + 256))  # of nn.init.xavier_uniform_
    assert 0.98 * bound < drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_initial_values_depend_on_seed_and_name_alone(make_recipe: MakeRecipe) -> None:
    specs = build_table(make_recipe())
    matrices = [s for s in specs if s.init == "normal"]
    values = [initial_value(s, seed) for s in matrices for seed in (0, 1)]
    assert all(torch.equal(initial_value(s, 1), values[2 * i + 1]) for i, s in reversed(list(enumerate(matrices))))
    assert len({tuple(v.flatten()[:8].tolist()) for v in values}) == len(values)
    assert all(v.dtype == torch.float32 for v in values)


def test_initialise_fills_every_parameter(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    specs = build_table(recipe)
    model = models.build(recipe.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialise(model, specs, seed=3)
    for spec in specs:
        assert torch.equal(model.get_parameter(spec.name), initial_value(spec, 3)), spec.name
    assert model.readout.multiplier == 0.25
    x = torch.randn(1, 16, 64)
    weight = torch.randn_like(model.readout.weight)
    nn.init.zeros_(model.readout.bias)
    with torch.no_grad():
        model.readout.weight.copy_(weight)
    torch.testing.assert_close(model.readout(x), 0.25 * (x @ weight.T))


def test_multipliers_are_set_on_a_meta_model(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    model = base_shapes.meta_model(recipe.model)
    set_multipliers(model, build_table(recipe))
    assert model.readout.multiplier == 0.25
    assert "multiplier=0.25" in repr(model.readout)


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.2]), st.sampled_from([0.0, 0.5]), st.sampled_from([1e-8])), min_size=1)
)
def test_groups_partition_the_table(rows: list[tuple[float, float, float]]) -> None:
    specs = [
        ParamSpec(f"p{i}", (1,), "vector", 1.0, "zero", 0.0, dict(zip(("lr", "weight_decay", "eps"), row, strict=True)))
        for i, row in enumerate(rows)
    ]
    groups = param_groups(specs)
    assert len({tuple(g.hyperparameters.items()) for g in groups}) == len(groups)
    assert sorted(name for g in groups for name in g.names) == sorted(s.name for s in specs)
    owner = {name: g.hyperparameters for g in groups for name in g.names}
    assert all(owner[s.name] == s.hyperparameters for s in specs)


def test_printed_table_and_json(make_recipe: MakeRecipe) -> None:
    specs = build_table(make_recipe())
    lines = format_table(specs).splitlines()
    assert lines[0].split() == ["name", "shape", "role", "m", "init", "multiplier", "lr", "weight", "decay"]
    readout = next(line for line in lines if line.startswith("readout.weight"))
    assert readout.split() == ["readout.weight", "12", "x", "64", "output", "4", "zero", "0.25", "0.01562", "0.1"]
    assert [line.split()[0] for line in lines[1 : len(specs) + 1]] == [s.name for s in specs]
    groups = [line.split() for line in lines[len(specs) + 3 : -1]]
    assert [(group[0], group[1]) for group in groups] == [("0.01562", "0.1"), ("0.003906", "0.4")]
    assert sum(int(group[3]) for group in groups) == len(specs)
    assert lines[-1] == f"{len(specs)} tensors, {sum(math.prod(s.shape) for s in specs):,} parameters"
    rows = json.loads(json.dumps(to_rows(specs)))
    assert [row["name"] for row in rows] == [s.name for s in specs]
    assert rows[0]["shape"] == list(specs[0].shape)
