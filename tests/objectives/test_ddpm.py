"""The DDPM objective against the equations in float64 and against diffusers' scheduler."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from megadit.batch import Batch
from megadit.models.dit import DiTConfig
from megadit.objectives.ddpm import DDPM, DDPMObjective, log_likelihood

CONFIG = DiTConfig(input_size=8, in_channels=3, width=72, num_classes=10)
DROPOUT = 0.25
CPU = torch.device("cpu")
TIMESTEPS = [0, 0, 1, 1, 2, 17, 100, 250, 500, 731, 998, 999]


class Fixed(nn.Module):
    """Predicts what it was made with, and remembers what it was asked."""

    def __init__(self, noise: Tensor, v: Tensor) -> None:
        super().__init__()
        self.noise, self.v = nn.Parameter(noise), nn.Parameter(v)

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, *, labels: Tensor, dropped_B: Tensor) -> Tensor:
        self.seen = {"x": x_BCHW, "timestep": timestep_B, "labels": labels, "dropped": dropped_B}
        return torch.cat([self.noise, self.v], dim=1)


def objective() -> DDPM:
    return DDPM(DDPMObjective(condition_dropout=DROPOUT), CONFIG, CPU)


def make_batch(size: int, seed: int = 0) -> Batch:
    """Pictures as they are in data: 256 values, many pixels quite black or quite white."""
    draws = torch.Generator().manual_seed(seed)
    shape = (size, 3, 8, 8)
    images = (torch.randn(shape, generator=draws) * 127.5).round().div(127.5).clamp(-1, 1)
    assert (images == 1).any() and (images == -1).any()
    return Batch(
        images=images,
        text=torch.zeros(size, 1, 1),
        text_lengths=torch.ones(size, dtype=torch.int64),
        pooled=torch.zeros(size, 1),
        labels=torch.arange(size) % 10,
        noise=torch.randn(shape, generator=draws),
        timestep_uniform=torch.rand(size, generator=draws),
        drop_uniform=torch.rand(size, generator=draws),
        epoch=torch.zeros(size, dtype=torch.int64),
        sample=torch.arange(size),
        replaced=torch.zeros(size, dtype=torch.int64),
        features=torch.zeros(size, 0, 0),
        pixels=torch.zeros(size, 0),
    )


def make_model(batch: Batch, error: float, seed: int = 1) -> Fixed:
    """Noise that is `error` off, v from below -1 to above 1."""
    draws = torch.Generator().manual_seed(seed)
    noise = batch.noise + error * torch.randn(batch.noise.shape, generator=draws)
    return Fixed(noise, 2.4 * torch.rand(batch.noise.shape, generator=draws) - 1.2)


def reference(x0: Tensor, noise: Tensor, predicted: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """L_simple and the bound's term in bits, each the mean of one sample, in float64, from the definitions alone.

    `t` counts from 1. The posterior q(x[t-1] | x[t], x[0]) is the product of the two normal densities that it is made
    of, q(x[t] | x[t-1]) as a function of x[t-1] and q(x[t-1] | x[0]): precisions add.
    """

    def beta(s: int) -> float:
        return 1e-4 + (0.02 - 1e-4) * (s - 1) / 999

    def alpha_bar(s: int) -> float:
        return math.prod(1 - beta(r) for r in range(1, s + 1))

    def posterior(s: int, x_t: Tensor, x_0: Tensor) -> tuple[Tensor, float]:
        alpha, before = 1 - beta(s), alpha_bar(s - 1)
        precision = alpha / beta(s) + 1 / (1 - before)
        weighted = math.sqrt(alpha) / beta(s) * x_t + math.sqrt(before) / (1 - before) * x_0
        return weighted / precision, 1 / precision

    x0, noise, predicted = x0.double(), noise.double(), predicted.double()
    x_t = math.sqrt(alpha_bar(t)) * x0 + math.sqrt(1 - alpha_bar(t)) * noise
    predicted_x0 = (x_t - math.sqrt(1 - alpha_bar(t)) * predicted.detach()) / math.sqrt(alpha_bar(t))
    smallest = posterior(max(t, 2), x_t, x0)[1]  # at t = 1 it would be 0; the next one stands in
    fraction = (v.double() + 1) / 2
    std = torch.exp((fraction * math.log(beta(t)) + (1 - fraction) * math.log(smallest)) / 2)
    if t > 1:
        true_mean, true_variance = posterior(t, x_t, x0)
        mean = posterior(t, x_t, predicted_x0)[0]
        true = Normal(true_mean, torch.full_like(mean, math.sqrt(true_variance)))
        bound = kl_divergence(true, Normal(mean, std))
    else:
        model = Normal(predicted_x0, std)
        upper = torch.where(x0 > 0.999, 1.0, model.cdf(x0 + 1 / 255))
        lower = torch.where(x0 < -0.999, 0.0, model.cdf(x0 - 1 / 255))
        bound = -torch.log(upper - lower)
    return (predicted - noise).square().mean(), bound.mean() / math.log(2)


@pytest.mark.parametrize("error", [0.03, 0.3, 1.0])
def test_losses_equal_the_equations(error: float) -> None:
    batch = make_batch(len(TIMESTEPS))
    model = make_model(batch, error)
    losses = objective().losses(model, batch, torch.tensor(TIMESTEPS, dtype=torch.float32))
    assert tuple(losses.by_metric) == DDPMObjective().metrics == ("noise", "bound")
    assert losses.total_B.dtype == torch.float32
    with torch.no_grad():
        terms = [
            reference(batch.images[i], batch.noise[i], model.noise[i], model.v[i], t + 1)
            for i, t in enumerate(TIMESTEPS)
        ]
    simple_B, bound_B = (torch.stack(column) for column in zip(*terms, strict=True))
    torch.testing.assert_close(losses.total_B.double(), simple_B + bound_B, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.by_metric["noise"].double(), simple_B, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.by_metric["bound"].double(), bound_B, rtol=1e-4, atol=1e-6)


def test_the_bound_alone_equals_the_equations() -> None:
    """With the noise exact L_simple is 0, so that small terms of the bound are seen."""
    batch = make_batch(len(TIMESTEPS))
    model = make_model(batch, 0.0)
    losses = objective().losses(model, batch, torch.tensor(TIMESTEPS, dtype=torch.float32))
    for i, t in enumerate(TIMESTEPS[:10]):  # later ones are below 1e-7
        simple, bound = reference(batch.images[i], batch.noise[i], model.noise[i], model.v[i], t + 1)
        assert simple == 0
        assert losses.by_metric["bound"][i].item() == pytest.approx(bound.item(), rel=1e-4)
        assert losses.total_B[i] == losses.by_metric["bound"][i]


def test_the_bound_trains_the_variance_alone() -> None:
    batch = make_batch(len(TIMESTEPS))
    model = make_model(batch, 0.4)
    objective().losses(model, batch, torch.tensor(TIMESTEPS, dtype=torch.float32)).total_B.sum().backward()
    num_pixels = model.noise[0].numel()
    torch.testing.assert_close(model.noise.grad, 2 * (model.noise - batch.noise).detach() / num_pixels)

    v = model.v.detach().double().requires_grad_()
    for i, t in enumerate(TIMESTEPS):
        simple, bound = reference(batch.images[i], batch.noise[i], model.noise[i], v[i], t + 1)
        (simple + bound).backward()
    assert v.grad is not None and (v.grad.flatten(1).abs().amax(1) > 0).all()
    assert model.v.grad is not None
    for i in range(len(TIMESTEPS)):
        scale = v.grad[i].abs().max().item()
        torch.testing.assert_close(model.v.grad[i].double(), v.grad[i], rtol=1e-4, atol=1e-5 * scale)


def test_the_network_sees_the_noisy_picture_and_who_is_dropped() -> None:
    batch = make_batch(64)
    timestep_B = torch.arange(64).float() * 15
    model = make_model(batch, 0.0)
    objective().losses(model, batch, timestep_B)
    scheduler = DDPMScheduler(beta_schedule="linear")
    noisy = scheduler.add_noise(batch.images, batch.noise, timestep_B.long())  # type: ignore[arg-type]
    torch.testing.assert_close(model.seen["x"], noisy, rtol=0, atol=1e-5)
    assert torch.equal(model.seen["timestep"], timestep_B)
    assert torch.equal(model.seen["labels"], batch.labels)
    assert torch.equal(model.seen["dropped"], batch.drop_uniform < DROPOUT)
    assert 0 < int(model.seen["dropped"].sum()) < 64
    assert objective().targets(batch) is batch.noise


def test_the_linear_schedule() -> None:
    """beta_1 = 1e-4 and alpha_bar_1000 = 4.0358e-5 (2006.11239: "x_T is nearly pure noise")."""
    batch = make_batch(2)
    for images, noise, expected in [
        (1.0, 0.0, [1 - 1e-4, 4.0358e-5]),
        (0.0, 1.0, [1e-4, 1 - 4.0358e-5]),
    ]:
        still = replace(batch, images=torch.full_like(batch.images, images), noise=torch.full_like(batch.noise, noise))
        model = make_model(still, 0.0)
        objective().losses(model, still, torch.tensor([0.0, 999.0]))
        assert model.seen["x"].square()[:, 0, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("t", [1, 10, 100, 400])
def test_the_variance_is_that_of_diffusers(t: int) -> None:
    """With the noise exact, the bound is the divergence of two normal densities of one mean."""
    scheduler = DDPMScheduler(beta_schedule="linear", variance_type="learned_range")
    batch = make_batch(1)
    model = make_model(batch, 0.0)
    log_variance = scheduler._get_variance(t, predicted_variance=model.v.detach()).double()
    true_std = scheduler._get_variance(t, variance_type="fixed_small").double().sqrt()
    zero = torch.zeros_like(log_variance)
    expected = kl_divergence(Normal(zero, true_std), Normal(zero, torch.exp(log_variance / 2))).mean() / math.log(2)
    assert objective().losses(model, batch, torch.tensor([float(t)])).total_B.item() == pytest.approx(
        expected.item(), rel=2e-3
    )


@given(offset=st.floats(-0.2, 0.2), log_variance=st.floats(-11, -6))
def test_the_probabilities_of_all_pixels_sum_to_one(offset: float, log_variance: float) -> None:
    pixels = torch.arange(256) / 127.5 - 1
    mean = torch.full((256,), offset * 6)
    logs = log_likelihood(pixels, pixels - mean, torch.full((256,), log_variance))
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("v", [-60.0, 60.0])
def test_a_variance_far_out_of_its_range(v: float) -> None:
    batch = make_batch(3)
    model = Fixed(batch.noise.clone(), torch.full_like(batch.noise, v))
    losses = objective().losses(model, batch, torch.tensor([0.0, 300.0, 999.0])).total_B
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert model.v.grad is not None and torch.isfinite(model.v.grad).all()


@given(st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1))
def test_timesteps_are_whole_numbers(uniforms: list[float]) -> None:
    uniform_B = torch.tensor(sorted(uniforms), dtype=torch.float32)
    timestep_B = objective().timesteps(uniform_B)
    assert timestep_B.dtype == torch.float32
    assert ((timestep_B >= 0) & (timestep_B <= 999) & (timestep_B == timestep_B.round())).all()
    assert (timestep_B.diff() >= 0).all()


def test_every_timestep_is_as_likely() -> None:
    middles = (torch.arange(4000) + 0.5) / 4000
    for timesteps in (objective().timesteps, objective().timesteps_at):
        assert torch.equal(timesteps(middles).long().bincount(), torch.full((1000,), 4))
