"""Sampling of rectified flow, by diffusers' flow-matching schedulers: Euler and Heun."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from megadit.sampling.guidance import Predict

NUM_TIMESTEPS = 1000  # times are t * 1000


def euler(predict: Predict, x_BCHW: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """From noise to images [B, C, H, W] along the predicted velocity, one prediction a step; see `times`."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times(num_steps, shift)[:-1].tolist())
    return _follow(scheduler, predict, x_BCHW)


def heun(predict: Predict, x_BCHW: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """From noise to images [B, C, H, W] by Heun's method (the explicit trapezoid), two predictions a step.

    The last step, to time 0, is one of Euler, as diffusers has it. See `times`.
    """
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    # Its own times are not evenly spaced, and with a shift are shifted twice.
    first, *inner, last = times(num_steps, shift).float()
    scheduler.sigmas = torch.stack([first, *(time for time in inner for _ in range(2)), last])
    scheduler.timesteps = scheduler.sigmas[:-1] * NUM_TIMESTEPS
    return _follow(scheduler, predict, x_BCHW)


def times(num_steps: int, shift: float = 1.0) -> Tensor:
    """The times from 1 to 0 between steps, float64 [num_steps + 1]: evenly spaced, then shifted to noise.

    t' = shift t / (1 + (shift - 1) t), arXiv 2403.03206, section 5.3.2; 3 is what SD3 takes at 1024 pixels.
    """
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


def _follow(
    scheduler: FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler, predict: Predict, x_BCHW: Tensor
) -> Tensor:
    for timestep in scheduler.timesteps:
        x_BCHW = scheduler.step(predict(x_BCHW, timestep), timestep, x_BCHW).prev_sample
    return x_BCHW
