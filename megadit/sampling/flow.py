"""Sampling of rectified flow: classifier-free guidance around diffusers' flow-matching scheduler."""

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from megadit.randomness import Purpose, generator
from megadit.recipe import MMDiTModel


@torch.no_grad()
def generate(
    model: nn.Module,
    config: MMDiTModel,
    text: Mapping[str, Tensor],
    guidance_scale: float,
    num_steps: int,
    seed: int,
) -> Tensor:
    """Images [B, C, H, W] in [-1, 1]; the noise of image i depends on (seed, i) alone.

    Args:
        text: the model's text arguments for B captions: `text`, `text_lengths`, `pooled`.
        guidance_scale: 1 is the conditional model alone, 0 the unconditional one (arXiv 2207.12598,
            whose w is scale - 1).
    """
    shape = (config.in_channels, config.input_size, config.input_size)
    noise = [
        generator(seed, Purpose.SAMPLING_NOISE, i).standard_normal(shape, np.float32) for i in range(len(text["text"]))
    ]
    x_BCHW = torch.from_numpy(np.stack(noise))
    null = {key: torch.zeros_like(value) for key, value in text.items()}
    null["text_lengths"] = torch.ones_like(text["text_lengths"])  # a dropped caption is one zero token
    both = {key: torch.cat([text[key], null[key]]) for key in text}

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
    for timestep in scheduler.timesteps:
        t_B = (timestep / 1000).expand(2 * len(x_BCHW)).float()
        with_text, without_text = model(torch.cat([x_BCHW, x_BCHW]), t_B, **both).float().chunk(2)
        velocity = torch.lerp(without_text, with_text, guidance_scale)
        x_BCHW = scheduler.step(velocity, timestep, x_BCHW).prev_sample
    return x_BCHW.clamp(-1, 1)
