"""Sampling of a model with a learned variance, by diffusers' schedulers: ancestral, and DPM-Solver++."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from megadit.objectives.ddpm import FIRST_BETA, LAST_BETA, NUM_TIMESTEPS
from megadit.sampling.guidance import Predict

SCHEDULE = {  # "leading" and "trailing" are off by up to 27% from the published samplers
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": FIRST_BETA,
    "beta_end": LAST_BETA,
    "beta_schedule": "linear",
    "timestep_spacing": "linspace",
}


def denoise(predict: Predict, x_BCHW: Tensor, num_steps: int, draws: Sequence[torch.Generator]) -> Tensor:
    """From noise to images [B, C, H, W] in `num_steps` of the 1000 timesteps, evenly spaced from 999 to 0.

    As in the published sampling of DiT, with 250 steps: betas are those of the timesteps left, the predicted picture
    is not clipped. The noise that is added to image i comes from `draws[i]`, a generator on the CPU. Raises ValueError
    for a number of steps that is not in [2, 1000].
    """
    scheduler = DDPMScheduler(**SCHEDULE, variance_type="learned_range", clip_sample=False)
    _set_timesteps(scheduler, num_steps)
    for timestep in scheduler.timesteps:
        x_BCHW = scheduler.step(predict(x_BCHW, timestep), timestep, x_BCHW, generator=list(draws)).prev_sample
    return x_BCHW


def solve(predict: Predict, x_BCHW: Tensor, num_steps: int) -> Tensor:
    """From noise to images [B, C, H, W] by DPM-Solver++ (arXiv 2211.01095), multistep, order 2, ending at sigma 0.

    As in the published sampling of PixArt-alpha, with 20 steps. The learned variance is not used. Raises ValueError for
    a number of steps that is not in [2, 1000].
    """
    scheduler = DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )
    _set_timesteps(scheduler, num_steps)
    for timestep in scheduler.timesteps:
        noise_BCHW = predict(x_BCHW, timestep)[:, : x_BCHW.shape[1]]
        x_BCHW = scheduler.step(noise_BCHW, timestep, x_BCHW).prev_sample
    return x_BCHW


def check_num_steps(num_steps: int) -> None:
    """Raise ValueError for a number of steps that cannot be."""
    if not 2 <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(f"num_steps {num_steps} must be in [2, {NUM_TIMESTEPS}] for objective.kind ddpm")


def _set_timesteps(scheduler: Any, num_steps: int) -> None:
    check_num_steps(num_steps)
    scheduler.set_timesteps(num_steps)
