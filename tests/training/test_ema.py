"""Averages of the weights: against the sums that they stand for, and through a run that stops and goes on elsewhere."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from megadit.cli import app
from megadit.engines.base import Shard
from megadit.recipe import Recipe, RecipeError
from megadit.sampling.generate import sample
from megadit.training import checkpoint
from megadit.training.ema import Averages, average_names, exponent_of_std, rate_of_step

AVERAGES = "training.ema_rates=[0.9]", "training.ema_power_stds=[0.05,0.2]"
SHORT = ("training.num_images=96", "validation.every_images=96", "validation.num_timesteps=1")
STOPPED = ("checkpoints.every_images=48", "checkpoints.keep=9")
STDS = st.floats(0.02, 0.28)


@pytest.mark.parametrize(("std", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_published_exponents(std: float, exponent: float) -> None:
    """arXiv 2312.02696, section 3.1."""
    assert exponent_of_std(std) == pytest.approx(exponent, abs=5e-3)


@given(STDS)
def test_the_weights_over_time_have_the_relative_std_that_names_the_average(std: float) -> None:
    weights = torch.tensor(weights_over_steps(std, 20_000), dtype=torch.float64)
    time = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    mean = (weights * time).sum()
    assert float((weights * (time - mean).square()).sum().sqrt()) == pytest.approx(std, rel=1e-3)
    assert rate_of_step(exponent_of_std(std), 1) == 0


def test_the_widest_power_function_is_the_mean() -> None:
    assert exponent_of_std(12**-0.5) == pytest.approx(0, abs=1e-9)
    assert weights_over_steps(12**-0.5, 4) == pytest.approx([0.25] * 4)


@given(STDS, st.floats(0.1, 0.99), st.integers(1, 30))
def test_averages_are_the_sums_that_they_stand_for(std: float, rate: float, num_steps: int) -> None:
    """The weight of step k in a power function is its integral over the step, (k/T)^(gamma+1) - ((k-1)/T)^(gamma+1)."""
    initial, *steps = torch.randn(num_steps + 1, 3, generator=torch.Generator().manual_seed(0))
    values = initial.clone()
    averages = Averages({"w": Shard(torch.Size([3]), 0, values)}, [rate], [std])
    for number, weights in enumerate(steps, 1):
        values.copy_(weights)
        averages.update(number)
    found = {name: tensors["w"] for name, tensors in averages.by_name().items()}
    constant = [rate**num_steps, *((1 - rate) * rate ** (num_steps - k) for k in range(1, num_steps + 1))]
    torch.testing.assert_close(found[f"ema_{rate}"], weighted([initial, *steps], constant))
    torch.testing.assert_close(found[f"ema_std{std}"], weighted(steps, weights_over_steps(std, num_steps)))


def test_names_tell_close_rates_apart() -> None:
    names = ["ema_0.9999999", "ema_0.99999995", "ema_std0.05", "ema_std0.1"]
    assert average_names([0.9999999, 0.99999995], [0.05, 0.10]) == names
    assert list(Averages({}, [0.9999999, 0.99999995], [0.05, 0.10]).by_name()) == names


@pytest.mark.parametrize("std", [0, 0.3, -0.1])
def test_a_std_that_no_power_function_has_is_refused(std: float, tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"training\.ema_power_stds"):
        tiny_recipe(f"training.ema_power_stds=[{std}]")


def test_averages_of_a_run_are_those_of_the_images_seen(
    train: Callable, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A run saved at every step, so that the sum over its weights can be taken."""
    every_step = ("checkpoints.every_images=16", "checkpoints.keep=9", "validation=null")
    run = train(tiny_recipe(*AVERAGES, *SHORT, *every_step))
    paths = run.checkpoints()
    assert len(paths) == 6
    saved = [checkpoint.read_tensors(path, "weight") for path in paths]
    for std in (0.05, 0.2):
        found = checkpoint.read_tensors(paths[-1], f"ema_std{std}")
        over_steps = weights_over_steps(std, len(paths))
        for name, values in found.items():
            torch.testing.assert_close(values, weighted([tensors[name] for tensors in saved], over_steps))


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_averages_go_on_on_another_engine(
    kind: str, train: Callable, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    whole = train(tiny_recipe(*AVERAGES, *SHORT, *STOPPED))
    folder = tmp_path / "run"
    stopped = train(tiny_recipe(*AVERAGES, *SHORT, *STOPPED), folder)
    newest = stopped.checkpoints()[-1]
    newest.rename(tmp_path / newest.name)  # as if it had been killed after three of the six steps
    resumed = train(tiny_recipe(*AVERAGES, *SHORT, *STOPPED, f"engine.kind={kind}", "engine.num_ranks=2"), folder)
    for name in average_names([0.9], [0.05, 0.2]):
        assert resumed.largest_difference(whole, name) < 1e-4
    assert resumed.validation() == pytest.approx(whole.validation(), rel=1e-5)
    assert list(whole.validation()) == ["raw", "ema_0.9", "ema_std0.05", "ema_std0.2"]


def test_a_power_function_is_exported_and_sampled_by_name(
    train: Callable, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = train(tiny_recipe(*AVERAGES, "training.ema_rates=[]", *SHORT, *STOPPED))
    expected = checkpoint.read_tensors(run.checkpoints()[-1], "ema_std0.2")
    out = tmp_path / "out.safetensors"
    result = CliRunner().invoke(
        app, ["checkpoint", "convert", str(run.folder), str(out), "--weights", "ema_std0.2"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert all(torch.equal(load_file(out)[name], values) for name, values in expected.items())
    grids = {}
    for ema in (None, "ema_std0.05", "ema_std0.2"):
        sample(run.folder, ["red fox"], tmp_path / "grid.png", ema=ema, num_steps=1)
        grids[ema] = (tmp_path / "grid.png").read_bytes()
    assert grids[None] == grids["ema_std0.05"] != grids["ema_std0.2"]  # the first average is the default


def weights_over_steps(std: float, num_steps: int) -> list[float]:
    """The integral of the power function over each of the steps into which the training so far is cut."""
    power = exponent_of_std(std) + 1
    ends = [(step / num_steps) ** power for step in range(num_steps + 1)]
    return [end - start for start, end in pairwise(ends)]


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Any:
    assert math.isclose(sum(weights), 1)
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
