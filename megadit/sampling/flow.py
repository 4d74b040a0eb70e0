"""Sampling of rectified flow: Euler steps of diffusers' flow-matching scheduler, evenly spaced in time."""

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from megadit.sampling.guidance import Predict


def integrate(predict: Predict, x_BCHW: Tensor, num_steps: int) -> Tensor:
    """From noise to images [B, C, H, W] along the predicted velocity."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
    for timestep in scheduler.timesteps:
        x_BCHW = scheduler.step(predict(x_BCHW, timestep), timestep, x_BCHW).prev_sample
    return x_BCHW
