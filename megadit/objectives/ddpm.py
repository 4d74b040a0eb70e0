"""Diffusion with a learned variance: L_simple + L_vlb of IDDPM (arXiv 2102.09672), as DiT and PixArt-alpha train it.

The network predicts two tensors: the noise, and v, which says where the log variance of the reverse step lies between
its bounds. Timestep t here is t + 1 in the papers, as in the published code and in diffusers: 0 is the least noisy.
It is sampled by diffusers' schedulers: ancestral, and DPM-Solver++.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from megadit.batch import Batch
from megadit.models import ModelConfig
from megadit.objectives.objective import (
    SAME_LOSS,
    Losses,
    ObjectiveConfig,
    ObjectiveKind,
    Predict,
    SamplerKind,
    arguments,
)

NUM_TIMESTEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02  # linear between (arXiv 2006.11239, section 4)
HALF_BIN = 1 / 255  # pixels have 256 values in [-1, 1]
SCHEDULE = {  # of diffusers; "leading" and "trailing" are off by up to 27% from the published samplers
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": FIRST_BETA,
    "beta_end": LAST_BETA,
    "beta_schedule": "linear",
    "timestep_spacing": "linspace",
}


class DDPMObjective(ObjectiveConfig):
    """Noise prediction with a learned variance: L_simple + L_vlb (arXiv 2102.09672), 1000 steps, linear betas."""

    kind: Annotated[Literal["ddpm"], SAME_LOSS] = "ddpm"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Mean squared error of the noise; the variational bound's term in bits per dimension."""
        return ("noise", "bound")

    def check_model(self, model: ModelConfig) -> None:
        if model.out_channels != 2 * model.in_channels:
            raise ValueError(f"objective.kind ddpm needs a model with learn_sigma (family {model.family})")
        if model.feature_dim is not None:
            raise ValueError("model.repa (the head) has no loss in objective.kind ddpm: leave it out")


class DDPM:
    """The objective `ddpm`. Tables over timesteps are computed in float64 and kept in float32."""

    def __init__(
        self, objective: DDPMObjective, config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self._condition_dropout = objective.condition_dropout
        self._model = config
        beta_T = torch.linspace(FIRST_BETA, LAST_BETA, NUM_TIMESTEPS, dtype=torch.float64)
        alpha_T = 1 - beta_T
        alpha_bar_T = alpha_T.cumprod(0)
        alpha_bar_before_T = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar_T[:-1]])
        posterior_variance_T = beta_T * (1 - alpha_bar_before_T) / (1 - alpha_bar_T)
        posterior_variance_T[0] = posterior_variance_T[1]  # it is 0 there, and the network learns its logarithm

        def table(values_T: Tensor) -> Tensor:
            return values_T.to(device, torch.float32)

        self._image_scale_T = table(alpha_bar_T.sqrt())
        self._noise_scale_T = table((1 - alpha_bar_T).sqrt())
        self._log_variance_T = table(posterior_variance_T.log())
        self._log_variance_range_T = table(beta_T.log() - posterior_variance_T.log())
        # An error of the predicted noise moves the mean of the reverse step by its square root (2006.11239, eq. 12).
        self._mean_factor_T = table(beta_T.square() / (alpha_T * (1 - alpha_bar_T)))

    def timesteps(self, uniform_B: Tensor) -> Tensor:
        """Uniform over the whole numbers 0 to 999."""
        return (NUM_TIMESTEPS * uniform_B).floor()

    def timesteps_at(self, fraction_B: Tensor) -> Tensor:
        return self.timesteps(fraction_B)

    def losses(self, model: nn.Module, batch: Batch, timestep_B: Tensor) -> Losses:
        """Mean squared error of the noise plus the variational bound in bits per dimension.

        The bound trains the variance alone: the predicted noise is detached in it. It has factor 1, as in the
        published training of both models (their sum of all 1000 terms would have factor 1000).
        """
        step_B = timestep_B.long()
        noisy = _gather(self._image_scale_T, step_B) * batch.images
        noisy = noisy + _gather(self._noise_scale_T, step_B) * batch.noise
        prediction = model(noisy, timestep_B, **arguments(batch, self._model, self._condition_dropout)).float()
        noise, v = prediction.chunk(2, dim=1)
        error = noise - batch.noise
        noise_B = error.square().flatten(1).mean(1)
        bound_B = (self._bound(error.detach(), v, batch.images, step_B) / math.log(2)).flatten(1).mean(1)
        return Losses(noise_B + bound_B, {"noise": noise_B, "bound": bound_B})

    def targets(self, batch: Batch) -> Tensor:
        return batch.noise

    def _bound(self, error: Tensor, v: Tensor, images: Tensor, step_B: Tensor) -> Tensor:
        """The term of the variational bound at each timestep, in nats, for each element [B, C, H, W].

        Args:
            error: predicted minus true noise. Means enter through it: as differences of predictions of the
                picture they would lose half of float32's digits at late timesteps.
            v: -1 is the variance of the forward process's posterior, 1 its beta (2102.09672, eq. 15).
        """
        above = (
            0.5 * (v + 1) * _gather(self._log_variance_range_T, step_B)
        )  # log variance, counted from its lower bound
        log_variance = _gather(self._log_variance_T, step_B) + above
        squared_shift = _gather(self._mean_factor_T, step_B) * error.square()
        divergence = 0.5 * (torch.expm1(-above) + above + squared_shift * torch.exp(-log_variance))
        # Zero's mean is the predicted picture itself, off by noise_scale / image_scale times the noise's error.
        offset = self._noise_scale_T[0] / self._image_scale_T[0] * error
        likelihood = log_likelihood(images, offset, log_variance)
        return torch.where(step_B.view(-1, 1, 1, 1) == 0, -likelihood, divergence)


def log_likelihood(pixels: Tensor, offset: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of each pixel's bin under a normal distribution (2006.11239, eq. 13), in nats.

    The bins are 1/127.5 wide; those of the darkest and the brightest value reach to infinity. `offset` is pixel minus
    mean. The integral is exact where the published code has an approximation and a floor of 1e-12. In latents bins mean
    nothing, but the published training has them there too.
    """
    scale = torch.exp(-0.5 * log_variance)
    # By symmetry, seen from the lower tail, where the distribution function keeps its digits.
    near = torch.special.log_ndtr((HALF_BIN - offset.abs()) * scale)
    far = torch.special.log_ndtr((-HALF_BIN - offset.abs()) * scale)
    # (The floor is for a diverging variance: a bin that float32 cannot tell from nothing.)
    inside = near + torch.log((-torch.expm1(far - near)).clamp(min=1e-12))
    darkest = torch.special.log_ndtr((offset + HALF_BIN) * scale)
    brightest = torch.special.log_ndtr((HALF_BIN - offset) * scale)
    return torch.where(pixels < -0.999, darkest, torch.where(pixels > 0.999, brightest, inside))


def _gather(table_T: Tensor, step_B: Tensor) -> Tensor:
    return table_T[step_B].view(-1, 1, 1, 1)


def denoise(predict: Predict, x_BCHW: Tensor, num_steps: int, draws: Sequence[torch.Generator]) -> Tensor:
    """From noise to images [B, C, H, W] in `num_steps` of the 1000 timesteps, evenly spaced from 999 to 0.

    As in the published sampling of DiT, with 250 steps: betas are those of the timesteps left, the predicted picture
    is not clipped. The noise that is added to image i comes from `draws[i]`, a generator on the CPU.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**SCHEDULE, variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(num_steps)
    for timestep in scheduler.timesteps:
        x_BCHW = scheduler.step(predict(x_BCHW, timestep), timestep, x_BCHW, generator=list(draws)).prev_sample
    return x_BCHW


def solve(predict: Predict, x_BCHW: Tensor, num_steps: int) -> Tensor:
    """From noise to images [B, C, H, W] by DPM-Solver++ (arXiv 2211.01095), multistep, order 2, ending at sigma 0.

    As in the published sampling of PixArt-alpha, with 20 steps. The learned variance is not used.
    """
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    for timestep in scheduler.timesteps:
        noise_BCHW = predict(x_BCHW, timestep)[:, : x_BCHW.shape[1]]
        x_BCHW = scheduler.step(noise_BCHW, timestep, x_BCHW).prev_sample
    return x_BCHW


_STEPS = (2, NUM_TIMESTEPS)
DDPM_KIND = ObjectiveKind(
    config=DDPMObjective,
    build=DDPM,
    samplers={
        "ddpm": SamplerKind(denoise, default_steps=250, steps=_STEPS, takes=("draws",)),  # as DiT
        "dpm++": SamplerKind(solve, default_steps=20, steps=_STEPS),  # as PixArt-alpha
    },
)
