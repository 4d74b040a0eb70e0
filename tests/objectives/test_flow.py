"""Rectified flow by hand: the loss, dropped conditions, timesteps, and the alignment loss on top."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megadit import models, objectives
from megadit.batch import Batch
from megadit.data.loading.loader import Loader
from megadit.parametrization.initialisation import initialise
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe

CPU = torch.device("cpu")


def batch_of(recipe: Recipe) -> Batch:
    batches = Loader(recipe.data, recipe.seed, recipe.training.batch_size, 0, 1).iterate(0)
    batch = next(batches)
    batches.close()
    return batch


class Spy(nn.Module):
    """Predicts zeros and remembers what it was asked."""

    def forward(self, x: Tensor, timestep_B: Tensor, **arguments: Any) -> Tensor:
        self.x, self.timestep_B, self.arguments = x, timestep_B, arguments
        return torch.zeros_like(x)


def test_noisy_pictures_targets_and_dropped_captions(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("objective.condition_dropout=0.5")
    batch, objective, model = batch_of(recipe), objectives.build(recipe.objective, recipe.model, CPU), Spy()
    timestep_B = objective.timesteps(batch.timestep_uniform)
    losses = objective.losses(model, batch, timestep_B)
    t = (timestep_B.double() / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(model.x.double(), (1 - t) * batch.images + t * batch.noise, rtol=1e-5, atol=1e-6)
    expected_B = (batch.noise - batch.images).double().square().mean((1, 2, 3))
    torch.testing.assert_close(losses.total_B.double(), expected_B, rtol=1e-6, atol=0)
    assert tuple(losses.by_metric) == recipe.objective.metrics == ("velocity",)
    assert torch.equal(losses.by_metric["velocity"], losses.total_B)
    assert torch.equal(model.arguments.pop("dropped_B"), batch.drop_uniform < 0.5)
    assert 0 < (batch.drop_uniform < 0.5).sum() < len(batch)
    assert model.arguments.keys() == {"text", "text_lengths", "pooled"}
    assert torch.equal(objective.targets(batch), batch.noise - batch.images)


def test_timesteps_are_logit_normal(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("objective.logit_mean=0.5", "objective.logit_std=2")
    objective = objectives.build(recipe.objective, recipe.model, CPU)
    quantiles = torch.tensor([0.02, 0.3, 0.5, 0.9])
    logits = torch.logit(objective.timesteps(quantiles) / 1000)
    expected = torch.distributions.Normal(0.5, 2.0).icdf(quantiles)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert objective.timesteps_at(torch.tensor([0.25])).item() == 250


def test_alignment_is_added_with_its_weight(tiny_recipe: Callable[..., Recipe], repa: list[str]) -> None:
    recipe = tiny_recipe(*repa)
    model = models.build(recipe.model)
    initialise(model, build_table(recipe), seed=0)
    batch, objective = batch_of(recipe), objectives.build(recipe.objective, recipe.model, CPU)
    timestep_B = objective.timesteps(batch.timestep_uniform)
    found = objective.losses(model, batch, timestep_B)
    found.total_B.mean().backward()
    assert tuple(found.by_metric) == recipe.objective.metrics == ("velocity", "alignment")
    plain = tiny_recipe()
    without = objectives.build(plain.objective, plain.model, CPU).losses(model, batch, timestep_B)
    torch.testing.assert_close(found.by_metric["velocity"], without.total_B, rtol=0, atol=0)
    alignment_B = found.by_metric["alignment"]  # minus a mean cosine
    torch.testing.assert_close(found.total_B, without.total_B + 0.25 * alignment_B, rtol=0, atol=0)
    assert alignment_B.abs().max() <= 1 + 1e-5
    assert alignment_B.abs().min() > 0
    for name, parameter in model.repa_head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert model.repa_head.readout.multiplier == 0.5


def test_the_head_is_trained_on_every_engine(
    tiny_recipe: Callable[..., Recipe], repa: list[str], run_ranks: Callable[..., list[Any]]
) -> None:
    curves = []
    for engine in (["engine.kind=single"], *(_two_ranks(kind) for kind in ("fsdp", "zero3"))):
        recipe = tiny_recipe(*repa, *engine)
        ranks = run_ranks("engine.py", recipe.engine.num_ranks, recipe=recipe, lr_factors=[1.0, 1.0, 1.0])
        curves.append([torch.cat([rank["losses"][step] for rank in ranks]) for step in range(3)])
    for curve in curves[1:]:
        for found, expected in zip(curve, curves[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(curves[0][0], curves[0][2])


def _two_ranks(kind: str) -> list[str]:
    return [f"engine.kind={kind}", "engine.num_ranks=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.repa={block: 1, feature_dim: 24}"], "state both or neither"),
        (["objective.repa={encoder: x}"], "state both or neither"),
        (["model.repa={block: 3, feature_dim: 24}"], "repa.block 3 must be at most depth 2"),
    ],
)
def test_half_a_configuration_is_refused(
    tiny_recipe: Callable[..., Recipe], overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_recipe(*overrides)


def test_a_missing_encoder_is_named(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("objective.repa={encoder: /no/dinov2}", "model.repa={block: 1, feature_dim: 24}")
    with pytest.raises(ValueError, match="/no/dinov2"):
        objectives.build(recipe.objective, recipe.model, CPU)


def test_an_encoder_of_another_size_is_named(tiny_recipe: Callable[..., Recipe], repa: list[str]) -> None:
    recipe = tiny_recipe(*repa, "model.repa.feature_dim=32")
    with pytest.raises(ValueError, match=r"24.*32|32.*24"):
        objectives.build(recipe.objective, recipe.model, CPU)
