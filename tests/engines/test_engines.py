"""Each engine against a plain model trained with torch's own AdamW, clip_grad_norm_ and AveragedModel."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from megadit import models, objectives
from megadit.data.loading.loader import Loader
from megadit.parametrization.groups import param_groups
from megadit.parametrization.initialisation import initialise
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe

LR_FACTORS = [1.0, 0.5, 0.25]
SETTINGS = ("optimizer.max_grad_norm=0.1", "optimizer.lr=2^-9", "optimizer.weight_decay=0.1", "optimizer.eps=1e-6")
ENGINES = {
    "single": ["engine.kind=single"],
    "fsdp": ["engine.kind=fsdp", "engine.num_ranks=2"],
    "fsdp, kept gathered": ["engine.kind=fsdp", "engine.num_ranks=2", "engine.reshard_after_forward=false"],
    "hsdp": ["engine.kind=fsdp", "engine.num_ranks=4", "engine.num_replicas=2"],
    "zero1": ["engine.kind=zero1", "engine.num_ranks=2"],
    "zero2": ["engine.kind=zero2", "engine.num_ranks=2"],
    "zero3": ["engine.kind=zero3", "engine.num_ranks=2"],
}
TWINS = {"dit": "dit-mup-search-cpu", "pixart": "pixart-mup-proxy-cpu"}
SMALL = (
    "parametrization.base_width=32",
    "training.batch_size=16",
    "training.num_images=64",
    "training.ema_rates=[0.9]",
)
CASES = [("mmdit", engine) for engine in ENGINES] + [(f, engine) for f in TWINS for engine in ("fsdp", "zero3")]


@dataclass(frozen=True)
class Case:
    """A recipe without and with an engine."""

    plain: Recipe
    recipe: Recipe


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe], twin: Callable[..., Recipe]) -> Case:
    family, engine = request.param
    make = tiny_recipe if family == "mmdit" else partial(twin, TWINS[family], *SMALL)
    return Case(make(*SETTINGS), make(*SETTINGS, *ENGINES[engine]))


def plain_model(recipe: Recipe) -> nn.Module:
    specs = build_table(recipe)
    model = models.build(recipe.model)
    initialise(model, specs, recipe.seed)
    return model


def plain_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """One group for each parameter."""
    groups = [{"params": [model.get_parameter(s.name)], **s.hyperparameters} for s in build_table(recipe)]
    return torch.optim.AdamW(groups, betas=recipe.optimizer.betas, foreach=False)


@pytest.fixture(scope="module")
def expected(case: Case) -> dict[str, Any]:
    """What tests/workers/engine.py does, with a plain model."""
    recipe = case.plain
    model = plain_model(recipe)
    optimizer = plain_optimizer(model, recipe)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)  # the first one copies
    lrs = [group["lr"] for group in optimizer.param_groups]
    found: dict[str, Any] = {"initial": values_of(model), "losses": [], "norms": []}
    objective = objectives.build(recipe.objective, recipe.model, torch.device("cpu"))
    stream = Loader(recipe.data, recipe.seed, recipe.training.batch_size, 0, 1).iterate(0)
    for factor in LR_FACTORS:
        batch = next(stream)
        loss_B = objective.losses(model, batch, objective.timesteps(batch.timestep_uniform)).total_B
        loss_B.mean().backward()
        found["losses"].append(loss_B.detach())
        found["norms"].append(nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm).item())
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    states = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    found["moments"] = [
        {name: state[moment].flatten() for name, state in states.items()} for moment in ("exp_avg", "exp_avg_sq")
    ]
    found["weight"], found["ema"] = values_of(model), values_of(averaged.module)
    batch = next(stream)
    with torch.no_grad():
        found["own"] = objective.losses(model, batch, 1000 * batch.timestep_uniform).total_B
        found["replaced"] = objective.losses(averaged.module, batch, 1000 * batch.timestep_uniform).total_B
    assert max(found["norms"]) > recipe.optimizer.max_grad_norm  # or clipping is not tested
    return found


@pytest.fixture(scope="module")
def ranks(case: Case, run_ranks: Callable) -> list[Any]:
    """What each rank of an engine found."""
    return run_ranks("engine.py", case.recipe.engine.num_ranks, recipe=case.recipe, lr_factors=LR_FACTORS)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().flatten().clone() for name, parameter in model.named_parameters()}


def joined(parts: list[dict[str, tuple[int, Tensor]]]) -> dict[str, Tensor]:
    """Whole flat tensors from the ranges of all ranks, which follow each other without gap or overlap.

    Replicas have the same ranges with the same values, to the bit.
    """
    whole = {}
    for name in parts[0]:
        pieces: dict[int, Tensor] = {}
        for offset, values in (part[name] for part in parts):
            if values.numel():
                assert torch.equal(pieces.setdefault(offset, values), values), name
        whole[name] = torch.cat([pieces[offset] for offset in sorted(pieces)])
        ends = [offset + len(values) for offset, values in sorted(pieces.items())]
        assert sorted(pieces) == [0, *ends[:-1]], name
    return whole


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative error of each tensor in norm; bias of the readout and the like may be all zero."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name] - values).norm() <= tolerance * values.norm(), name


def test_initial_weights_are_those_of_the_table(ranks: list[Any], expected: dict[str, Any]) -> None:
    found = joined([rank["initial"] for rank in ranks])
    assert found.keys() == expected["initial"].keys()
    for name, values in expected["initial"].items():
        assert torch.equal(found[name], values), name


def test_optimizer_groups_are_those_of_the_table(ranks: list[Any], case: Case) -> None:
    recipe = case.plain
    groups = param_groups(build_table(recipe))
    assert len({group.hyperparameters["lr"] for group in groups}) > 1
    for rank in ranks:
        for found, group in zip(rank["groups"], groups, strict=True):
            assert found == {
                **group.hyperparameters,
                "lr": group.hyperparameters["lr"] * LR_FACTORS[-1],
                "betas": recipe.optimizer.betas,
            }


def test_losses_and_gradient_norms(ranks: list[Any], expected: dict[str, Any]) -> None:
    for step, losses in enumerate(expected["losses"]):
        torch.testing.assert_close(torch.cat([rank["losses"][step] for rank in ranks]), losses, rtol=1e-4, atol=1e-6)
    for rank in ranks:
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def test_weights_moments_and_averages(ranks: list[Any], expected: dict[str, Any]) -> None:
    assert_equal_tensors(joined([rank["weight"] for rank in ranks]), expected["weight"], 1e-4)
    assert_equal_tensors(joined([rank["ema"] for rank in ranks]), expected["ema"], 1e-4)
    for number in (0, 1):
        found = joined([rank["moments"][number] for rank in ranks])
        assert_equal_tensors(found, expected["moments"][number], 1e-3)


def test_replaced_weights_are_used_and_then_put_back(ranks: list[Any], expected: dict[str, Any]) -> None:
    """FSDP2 keeps the root's weights gathered after a forward pass without a backward; they would be stale."""

    def over_ranks(key: str) -> Tensor:
        return torch.cat([rank[key] for rank in ranks])

    assert ((expected["own"] - expected["replaced"]).abs() > 1e-3).any()  # or the test could not tell them apart
    torch.testing.assert_close(over_ranks("own"), expected["own"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(over_ranks("replaced"), expected["replaced"], rtol=1e-4, atol=1e-6)
    assert torch.equal(over_ranks("own again"), over_ranks("own"))
    for rank in ranks:
        assert all(torch.equal(rank["weight again"][name][1], part[1]) for name, part in rank["weight"].items())


# The widths of the paper's models, of one block: tables are rounded by as much as they are long.
WIDE = (
    "model.width=1152",
    "model.depth=1",
    "model.head_dim=72",
    "model.input_size=32",
    "parametrization.base_width=72",
)


KINDS = ("fsdp", "zero1", "zero2", "zero3")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", TWINS)
def test_every_engine_has_the_buffers_of_the_plain_model(
    twin: Callable[..., Recipe], run_ranks: Callable[..., list[Any]], family: str, precision: str
) -> None:
    wide = (*SMALL, *WIDE, f"training.precision={precision}")
    recipes = [twin(TWINS[family], *wide, f"engine.kind={kind}") for kind in KINDS]
    plain = dict(models.build(recipes[0].model).named_buffers())
    assert plain
    (found,) = run_ranks("buffers.py", 1, recipes=recipes)
    for buffers in found:
        assert buffers.keys() == plain.keys()
        for name, value in plain.items():
            assert buffers[name].dtype == value.dtype
            assert torch.equal(buffers[name], value), name


@pytest.mark.parametrize("family", ["dit", pytest.param("pixart", marks=pytest.mark.slow)])
def test_engines_have_one_curve_in_bf16_at_the_width_of_the_paper(
    twin: Callable[..., Recipe], run_ranks: Callable[..., list[Any]], family: str
) -> None:
    """With the 16x16 positions of 256 pixels. Tables as DeepSpeed rounds them move DiT's losses by 1e-4."""
    wide = (*SMALL, *WIDE, "model.input_size=16", "model.patch_size=1", "training.batch_size=4")
    settings = ("training.precision=bf16", "engine.num_ranks=2", "optimizer.lr=2^-7")
    recipes = [twin(TWINS[family], *wide, *settings, f"engine.kind={kind}") for kind in KINDS]
    ranks = run_ranks("engine_steps.py", 2, jobs=[(recipe, None) for recipe in recipes], num_steps=2)
    curves = [torch.cat([torch.cat(rank[place]["losses"]) for rank in ranks]) for place in range(len(KINDS))]
    for kind, curve in zip(KINDS, curves, strict=True):
        assert curve.tolist() == pytest.approx(curves[0].tolist(), rel=1e-6), kind
