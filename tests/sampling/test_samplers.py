"""Samplers against trajectories from their equations, in float64."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megadit.objectives.ddpm import DDPMObjective
from megadit.objectives.flow import FlowObjective, times
from megadit.objectives.objective import ObjectiveConfig, Predict
from megadit.sampling.samplers import choose

FLOW, DDPM = FlowObjective(), DDPMObjective()
SHAPE = (2, 3, 4, 4)
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def draws() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(2)]


def velocity(x: Tensor, t: float) -> Tensor:
    return 0.3 * x + math.sin(3 * t) - 0.2 * t * x**2


def noise_and_v(x: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
    return 0.4 * x + math.sin(timestep / 300), 0.7 * torch.cos(x)


def predict_velocity(x: Tensor, timestep: Tensor) -> Tensor:
    return velocity(x, timestep.item() / 1000)


def predict_noise_and_v(x: Tensor, timestep: Tensor) -> Tensor:
    return torch.cat(noise_and_v(x, timestep.item()), dim=1)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))


def shifted(num_steps: int, shift: float) -> list[float]:
    even = [1 - step / num_steps for step in range(num_steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 28])
def test_euler(num_steps: int, shift: float) -> None:
    x, grid = start().double(), shifted(num_steps, shift)
    for t, after in pairwise(grid):
        x = x + (after - t) * velocity(x, t)
    sampled = choose(FLOW, "euler", num_steps, shift).sample(predict_velocity, start(), draws())
    torch.testing.assert_close(sampled.double(), x, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(times(num_steps, shift), torch.tensor(grid, dtype=torch.float64))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 28])
def test_heun(num_steps: int, shift: float) -> None:
    """The mean of the slopes at both ends of a step, the second where Euler's step leads; the last is Euler's."""
    x, grid = start().double(), shifted(num_steps, shift)
    for t, after in pairwise(grid):
        slope = velocity(x, t)
        if after > 0:
            slope = (slope + velocity(x + (after - t) * slope, after)) / 2
        x = x + (after - t) * slope
    seen = []

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep.item())
        return predict_velocity(x, timestep)

    sampled = choose(FLOW, "heun", num_steps, shift).sample(predict, start(), draws())
    torch.testing.assert_close(sampled.double(), x, atol=2e-6, rtol=1e-5)
    assert len(seen) == 2 * num_steps - 1
    assert {round(t, 2) for t in seen} == {round(1000 * t, 2) for t in grid[:-1]}


def test_heun_is_of_second_order() -> None:
    """Twice the steps: half the error of Euler, a quarter of Heun's (but for its last step)."""

    def sample(name: str, num_steps: int) -> Tensor:
        return choose(FLOW, name, num_steps).sample(predict_velocity, start(), draws())

    exact = sample("heun", 1000)
    errors = {name: [(sample(name, n) - exact).abs().max().item() for n in (20, 40)] for name in ("euler", "heun")}
    assert errors["euler"][0] / errors["euler"][1] == pytest.approx(2, rel=0.2)
    assert errors["heun"][0] / errors["heun"][1] > 3
    assert errors["heun"][0] < errors["euler"][1] / 3  # with as many predictions


@pytest.mark.parametrize(("num_steps", "first"), [(2, [999, 0]), (4, [999, 666, 333, 0]), (10, [999, 888, 777])])
def test_ddpm_with_a_learned_variance(num_steps: int, first: list[int]) -> None:
    """IDDPM (arXiv 2102.09672): the posterior mean, and a variance between beta and the posterior's, in logarithms."""
    timesteps = [round(999 - 999 * step / (num_steps - 1)) for step in range(num_steps)]
    assert timesteps[: len(first)] == first
    generators, x = draws(), start().double()
    for t, s in zip(timesteps, [*timesteps[1:], None], strict=True):
        noise, v = noise_and_v(x, t)
        bar, bar_before = ALPHA_BAR[t].item(), 1.0 if s is None else ALPHA_BAR[s].item()
        beta = 1 - bar / bar_before
        picture = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
        x_weight = math.sqrt(1 - beta) * (1 - bar_before) / (1 - bar)
        x = math.sqrt(bar_before) * beta / (1 - bar) * picture + x_weight * x
        if s is not None:
            posterior = beta * (1 - bar_before) / (1 - bar)
            fraction = (v + 1) / 2
            fresh = torch.cat([torch.randn((1, *SHAPE[1:]), generator=draw) for draw in generators])
            x = x + torch.exp((fraction * math.log(beta) + (1 - fraction) * math.log(posterior)) / 2) * fresh
    sampled = choose(DDPM, "ddpm", num_steps).sample(predict_noise_and_v, start(), draws())
    torch.testing.assert_close(sampled.double(), x, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("num_steps", [2, 5, 20, 25])
def test_dpm_solver_plus_plus(num_steps: int) -> None:
    """DPM-Solver++(2M), arXiv 2211.01095 algorithm 2, in lambda = log(alpha / sigma); the last step is of order 1."""
    grid = [round(999 - 999 * step / num_steps) for step in range(num_steps)]
    x, before = start().double(), None
    for place, t in enumerate(grid):
        bar = ALPHA_BAR[t].item()
        alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
        picture = (x - sigma * noise_and_v(x, t)[0]) / alpha
        if place + 1 == num_steps:  # sigma 0: what is left is the picture
            x = picture
            break
        bar_next = ALPHA_BAR[grid[place + 1]].item()
        alpha_next, sigma_next = math.sqrt(bar_next), math.sqrt(1 - bar_next)
        h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
        direction = picture
        if before is not None:
            last_picture, last_h = before
            r = last_h / h
            direction = (1 + 1 / (2 * r)) * picture - 1 / (2 * r) * last_picture
        x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * direction
        before = (picture, h)
    sampled = choose(DDPM, "dpm++", num_steps).sample(predict_noise_and_v, start(), draws())
    torch.testing.assert_close(sampled.double(), x, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize(
    ("objective", "name", "predict"),
    [(DDPM, "dpm++", predict_noise_and_v), (FLOW, "euler", predict_velocity), (FLOW, "heun", predict_velocity)],
)
def test_only_ancestral_sampling_draws(objective: ObjectiveConfig, name: str, predict: Predict) -> None:
    generators = draws()
    choose(objective, name, 4).sample(predict, start(), generators)
    for used, fresh in zip(generators, draws(), strict=True):
        assert torch.equal(used.get_state(), fresh.get_state())


def test_defaults_are_the_protocols() -> None:
    assert choose(DDPM, "ddpm").num_steps == 250 and choose(DDPM, "dpm++").num_steps == 20
    assert choose(DDPM).name == "ddpm" and choose(FLOW).name == "euler"
    assert choose(FLOW).describe() == {"name": "euler", "num_steps": 28, "shift": 1.0}
    assert choose(DDPM).describe() == {"name": "ddpm", "num_steps": 250}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: choose(FLOW, "dpm++"), "sampler dpm.* is not for objective.kind flow, which has euler, heun"),
        (lambda: choose(DDPM, "heun"), "sampler heun is not for objective.kind ddpm"),
        (lambda: choose(FLOW, "unipc"), r"no sampler 'unipc': there are .*ddpm, dpm\+\+, euler, heun"),
        (lambda: choose(DDPM, "ddpm", None, 2.0), r"--shift is for samplers of flow \(euler, heun\), not ddpm"),
        (lambda: choose(FLOW, "euler", 5, 0.0), "shift 0.0 must be above 0"),
        (lambda: choose(DDPM, "dpm++", 1001), r"num_steps 1001 must be in \[2, 1000\]"),
    ],
)
def test_what_does_not_go_together(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
