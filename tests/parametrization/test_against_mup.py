"""The parameter table against microsoft/mup (the method's own package) on the same model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mup
import pytest
import torch
from torch import Tensor, nn

from megadit import models
from megadit.parametrization import base_shapes
from megadit.parametrization.groups import param_groups
from megadit.parametrization.initialisation import initial_value, initialise
from megadit.parametrization.spec import ParamSpec
from megadit.parametrization.table import build_table
from megadit.randomness import named_generator
from megadit.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
SEED = 5


def mup_model(recipe: Recipe) -> nn.Module:
    """The same model as a user of microsoft/mup would set it up, before its weights are drawn."""

    def build(width: int) -> nn.Module:
        model = models.build(base_shapes.at_width(recipe.model, width))
        old = model.readout
        model.readout = mup.MuReadout(old.in_features, old.out_features, output_mult=recipe.parametrization.output_mult)
        return model

    width = recipe.parametrization.base_width
    model = build(recipe.model.width)
    mup.set_base_shapes(model, build(width), delta=build(width + recipe.model.head_dim))
    return model


def mup_initialise(model: nn.Module, specs: Sequence[ParamSpec], recipe: Recipe) -> None:
    """Draw weights by mup.init, with the standard deviation that each matrix has at base width."""
    base = models.build(base_shapes.at_width(recipe.model, recipe.parametrization.base_width))
    for spec in specs:
        parameter = model.get_parameter(spec.name)
        if spec.init in ("zero", "one"):
            nn.init.constant_(parameter, float(spec.init == "one"))
        else:
            torch.manual_seed(named_generator(SEED, spec.name).initial_seed())
            mup.init.normal_(parameter, std=base.get_parameter(spec.name).shape[1] ** -0.5)


def differences(specs: Sequence[ParamSpec], recipe: Recipe) -> list[str]:
    """Everything in which a table differs from what microsoft/mup does with the same model; empty if nothing."""
    found = []
    model = mup_model(recipe)
    mup_initialise(model, specs, recipe)
    optimizer = mup.MuAdamW(model.parameters(), lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    if [spec.name for spec in specs] != list(parameters):
        found.append("names")
    ninf = {"finite": 0, "input": 1, "hidden": 2, "output": 1}
    for spec in specs:
        parameter = parameters[spec.name]
        group = groups[id(parameter)]
        expected_ninf = len([d for d in parameter.infshape if d.isinf()]) if spec.role == "vector" else ninf[spec.role]
        if parameter.infshape.ninf() != expected_ninf or (spec.role == "vector" and parameter.ndim != 1):
            found.append(f"{spec.name}: role {spec.role}")
        pairs = {
            "width_mult": (spec.width_mult, parameter.infshape.width_mult()),
            "lr": (spec.lr, group["lr"]),
            "weight_decay": (spec.weight_decay, group["weight_decay"]),
            "eps": (spec.eps, group["eps"]),
        }
        if isinstance(model.get_submodule(spec.name.rpartition(".")[0]), mup.MuReadout) and parameter.ndim == 2:
            pairs["multiplier"] = (spec.multiplier, recipe.parametrization.output_mult / model.readout.width_mult())
        elif spec.multiplier != 1:
            found.append(f"{spec.name}: multiplier {spec.multiplier}")
        found += [f"{spec.name}: {what} {a} != {b}" for what, (a, b) in pairs.items() if abs(a - b) > 1e-12 * abs(b)]
        value = initial_value(spec, SEED)
        if not torch.allclose(value, parameter, rtol=1e-6, atol=1e-7):
            found.append(f"{spec.name}: initial value off by {(value - parameter).abs().max():.2g}")
    return found


RECIPES = {
    "width x 4": {},
    "width x 3": {"model": {"width": 48}},
    "narrower than base": {"model": {"width": 16}, "parametrization": {"base_width": 32}},
    "base width itself": {"model": {"width": 16}},
    "adaLN of the paper": {"parametrization": {"adaln_init": "paper"}},
    "output_mult": {"parametrization": {"output_mult": 4.0}},
}


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_table_equals_mup(make_recipe: MakeRecipe, changes: dict) -> None:
    recipe = make_recipe(**changes)
    assert differences(build_table(recipe), recipe) == []


BREAKAGES: dict[str, Callable[[ParamSpec], ParamSpec]] = {
    "hidden lr not divided": lambda s: replace(s, lr=s.lr * s.width_mult) if s.role == "hidden" else s,
    "hidden weight decay not multiplied": lambda s: (
        replace(s, weight_decay=s.weight_decay / s.width_mult) if s.role == "hidden" else s
    ),
    "readout multiplier 1": lambda s: replace(s, multiplier=1.0),
    "input initialised as hidden": lambda s: (
        replace(s, init_std=s.init_std * s.width_mult**-0.5) if s.role == "input" else s
    ),
    "hidden initialised as input": lambda s: (
        replace(s, init_std=s.init_std * s.width_mult**0.5) if s.role == "hidden" else s
    ),
    "role of input and hidden swapped": lambda s: replace(
        s, role={"input": "hidden", "hidden": "input"}.get(s.role, s.role)
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES.values(), ids=BREAKAGES)
def test_the_comparison_finds_a_broken_table(
    make_recipe: MakeRecipe, breakage: Callable[[ParamSpec], ParamSpec]
) -> None:
    recipe = make_recipe()
    assert differences([breakage(spec) for spec in build_table(recipe)], recipe)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> list[float]:
    """Losses of 10 steps on random data."""
    generator = torch.Generator().manual_seed(0)
    config = recipe.model

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    losses = []
    for _ in range(10):
        x, target = (random(4, config.in_channels, config.input_size, config.input_size) for _ in range(2))
        t = 1000 * torch.rand(4, generator=generator)
        conditions = {"text": random(4, 5, config.text_dim), "pooled": random(4, config.pooled_dim)}
        loss = (model(x, t, text_lengths=torch.tensor([1, 3, 5, 2]), **conditions) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_as_ours(recipe: Recipe, specs: Sequence[ParamSpec]) -> tuple[list[float], nn.Module]:
    model = models.build(recipe.model)
    initialise(model, specs, SEED)
    model = model.double()
    groups = [
        {
            "params": [model.get_parameter(name) for name in group.names],
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "eps": group.eps,
        }
        for group in param_groups(specs)
    ]
    return train(model, torch.optim.AdamW(groups), recipe), model


def trained_by_mup(recipe: Recipe, specs: Sequence[ParamSpec]) -> tuple[list[float], nn.Module]:
    model = mup_model(recipe)
    mup_initialise(model, specs, recipe)
    model = model.double()
    optimizer = mup.MuAdamW(model.parameters(), lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)
    return train(model, optimizer, recipe), model


@pytest.mark.parametrize("adaln_init", ["zero", "paper"])
def test_training_equals_mup_step_for_step(make_recipe: MakeRecipe, adaln_init: str) -> None:
    recipe = make_recipe(parametrization={"adaln_init": adaln_init})
    specs = build_table(recipe)
    losses, model = trained_as_ours(recipe, specs)
    expected, oracle = trained_by_mup(recipe, specs)
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, oracle.get_parameter(name), rtol=1e-5, atol=1e-6, msg=name)


def test_training_finds_a_broken_table(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    specs = build_table(recipe)
    broken = [BREAKAGES["hidden lr not divided"](spec) for spec in specs]
    losses, _ = trained_as_ours(recipe, broken)
    expected, _ = trained_by_mup(recipe, specs)
    assert losses != pytest.approx(expected, rel=1e-4)


def test_mup_reads_our_files(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    path = tmp_path / "ours.bsh"
    base_shapes.make(recipe, path)
    model = mup_model(recipe)
    expected = {name: p.infshape for name, p in model.named_parameters()}
    mup.set_base_shapes(model, str(path), rescale_params=False)
    for name, parameter in model.named_parameters():
        assert parameter.infshape == expected[name], name


def test_we_read_files_of_mup(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    path = tmp_path / "theirs.bsh"
    mup.save_base_shapes(mup_model(recipe), str(path))
    from_file = make_recipe(parametrization={"base_width": None, "base_shapes": str(path)})
    assert build_table(from_file) == build_table(recipe)
