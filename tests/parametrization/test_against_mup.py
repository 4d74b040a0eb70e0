"""The parameter table against microsoft/mup (the method's own package) on the same model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mup
import pytest
import torch
from torch import Tensor, nn

from megadit import models
from megadit.models.layers import Readout
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
        for name, old in list(model.named_modules()):
            if isinstance(old, Readout):
                new = mup.MuReadout(old.in_features, old.out_features, output_mult=recipe.parametrization.output_mult)
                model.set_submodule(name, new)
        return model

    width = recipe.parametrization.base_width
    model = build(recipe.model.width)
    mup.set_base_shapes(model, build(width), delta=build(width + recipe.model.head_dim))
    return model


def mup_initialise(model: nn.Module, recipe: Recipe) -> None:
    """Draw weights as the official code of arXiv 2505.15270 does: torch.nn.init for DiT, mup.init for PixArt.

    Its adaLN is not zero; where the recipe's is, modulations and DiT's class embedding are as in adaLN-Zero.
    """
    draw = {"dit": draw_as_dit, "pixart": draw_as_pixart, "mmdit": draw_as_mmdit}[recipe.model.family]
    for name, parameter in model.named_parameters():
        torch.manual_seed(named_generator(SEED, name).initial_seed())
        draw(name, parameter, recipe.parametrization.adaln_init == "zero")


def draw_as_dit(name: str, parameter: nn.Parameter, zero: bool) -> None:
    if name.endswith("bias") or name == "final_layer.linear.weight" or (zero and "adaLN" in name):
        nn.init.zeros_(parameter)
    elif "embedding_table" in name:
        nn.init.normal_(parameter, std=0.02 if zero else 1.0)
    else:
        nn.init.kaiming_normal_(parameter, a=1)


def draw_as_pixart(name: str, parameter: nn.Parameter, zero: bool) -> None:
    is_modulation = "t_block" in name or "scale_shift_table" in name
    starts_at_zero = name.endswith("bias") or name == "final_layer.linear.weight" or "cross_attn.proj" in name
    if starts_at_zero or (zero and is_modulation):
        nn.init.zeros_(parameter)
    elif is_modulation or "t_embedder" in name or "y_proj" in name:
        mup.init.normal_(parameter, std=0.02)
    else:
        mup.init.xavier_uniform_(parameter)


def draw_as_mmdit(name: str, parameter: nn.Parameter, zero: bool) -> None:
    if "qk_norm" in name:
        nn.init.ones_(parameter)
    elif name.endswith("bias") or name == "readout.weight" or (zero and "modulation" in name):
        nn.init.zeros_(parameter)
    else:
        nn.init.kaiming_normal_(parameter, a=1)


def differences(specs: Sequence[ParamSpec], recipe: Recipe) -> list[str]:
    """Everything in which a table differs from what microsoft/mup does with the same model; empty if nothing."""
    found = []
    model = mup_model(recipe)
    mup_initialise(model, recipe)
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
            "lr": (spec.hyperparameters["lr"], group["lr"]),
            "weight_decay": (spec.hyperparameters["weight_decay"], group["weight_decay"]),
            "eps": (spec.hyperparameters["eps"], group["eps"]),
        }
        owner = model.get_submodule(spec.name.rpartition(".")[0])
        if isinstance(owner, mup.MuReadout) and parameter.ndim == 2:
            pairs["multiplier"] = (spec.multiplier, recipe.parametrization.output_mult / owner.width_mult())
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
FAMILIES = ["dit", "pixart", "mmdit"]


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_table_equals_mup(make_recipe: MakeRecipe, family: str, changes: dict) -> None:
    recipe = make_recipe(family, **changes)
    assert differences(build_table(recipe), recipe) == []


def with_hyperparameter(spec: ParamSpec, name: str, factor: float) -> ParamSpec:
    return replace(spec, hyperparameters={**spec.hyperparameters, name: factor * spec.hyperparameters[name]})


BREAKAGES: dict[str, Callable[[ParamSpec], ParamSpec]] = {
    "hidden lr not divided": lambda s: with_hyperparameter(s, "lr", s.width_mult) if s.role == "hidden" else s,
    "hidden weight decay not multiplied": lambda s: (
        with_hyperparameter(s, "weight_decay", 1 / s.width_mult) if s.role == "hidden" else s
    ),
    "readout multiplier 1": lambda s: replace(s, multiplier=1.0),
    "input initialised as hidden": lambda s: (
        replace(s, init_std=s.init_std * s.width_mult**-0.5) if s.role == "input" else s
    ),
    "hidden initialised as input": lambda s: (
        replace(s, init_std=s.init_std * s.width_mult**0.5) if s.role == "hidden" else s
    ),
    "a table or embedding initialised as hidden": lambda s: (
        replace(s, init_std=s.init_std * s.width_mult**-0.5) if "table" in s.name else s
    ),
    "role of input and hidden swapped": lambda s: replace(
        s, role={"input": "hidden", "hidden": "input"}.get(s.role, s.role)
    ),
}


BROKEN = [(f, b) for f in FAMILIES for b in BREAKAGES if not (f == "mmdit" and "table" in b)]  # it has no table


@pytest.mark.parametrize(("family", "breakage"), BROKEN)
def test_the_comparison_finds_a_broken_table(make_recipe: MakeRecipe, family: str, breakage: str) -> None:
    recipe = make_recipe(family, parametrization={"adaln_init": "paper"})
    assert differences([BREAKAGES[breakage](spec) for spec in build_table(recipe)], recipe)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> list[float]:
    """Losses of 10 steps on random data."""
    generator = torch.Generator().manual_seed(0)
    config = recipe.model

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    losses = []
    for _ in range(10):
        x = random(4, config.in_channels, config.input_size, config.input_size)
        target = random(4, config.out_channels, config.input_size, config.input_size)
        t = 1000 * torch.rand(4, generator=generator)
        if config.family == "dit":
            conditions = {"labels": torch.randint(config.num_classes, (4,), generator=generator)}
        else:
            conditions = {"text": random(4, 5, config.text_dim), "text_lengths": torch.tensor([1, 3, 5, 2])}
        if config.family == "mmdit":
            conditions["pooled"] = random(4, config.pooled_dim)
        prediction = model(x, t, dropped_B=torch.tensor([False, True, False, False]), **conditions)
        loss = (prediction - target).square().mean()
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
        {"params": [model.get_parameter(name) for name in group.names], **group.hyperparameters}
        for group in param_groups(specs)
    ]
    return train(model, torch.optim.AdamW(groups), recipe), model


def trained_by_mup(recipe: Recipe) -> tuple[list[float], nn.Module]:
    model = mup_model(recipe)
    mup_initialise(model, recipe)
    model = model.double()
    optimizer = mup.MuAdamW(model.parameters(), lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)
    return train(model, optimizer, recipe), model


@pytest.mark.parametrize("adaln_init", ["zero", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_mup_step_for_step(make_recipe: MakeRecipe, family: str, adaln_init: str) -> None:
    recipe = make_recipe(family, parametrization={"adaln_init": adaln_init})
    specs = build_table(recipe)
    losses, model = trained_as_ours(recipe, specs)
    expected, oracle = trained_by_mup(recipe)
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, oracle.get_parameter(name), rtol=1e-5, atol=1e-6, msg=name)


SHOWN = ("hidden lr not divided", "readout multiplier 1", "a table or embedding initialised as hidden")


@pytest.mark.parametrize(("family", "breakage"), [pair for pair in BROKEN if pair[1] in SHOWN])
def test_training_finds_a_broken_table(make_recipe: MakeRecipe, family: str, breakage: str) -> None:
    recipe = make_recipe(family, parametrization={"adaln_init": "paper"})
    losses, _ = trained_as_ours(recipe, [BREAKAGES[breakage](spec) for spec in build_table(recipe)])
    expected, _ = trained_by_mup(recipe)
    assert losses != pytest.approx(expected, rel=1e-6)


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
