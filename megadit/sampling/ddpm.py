"""Ancestral sampling of a model with a learned variance, by diffusers' DDPM scheduler."""

from diffusers import DDPMScheduler
from torch import Tensor

from megadit.objectives.ddpm import FIRST_BETA, LAST_BETA, NUM_TIMESTEPS
from megadit.randomness import named_generator
from megadit.sampling.guidance import Predict


def denoise(predict: Predict, x_BCHW: Tensor, num_steps: int, seed: int) -> Tensor:
    """From noise to images [B, C, H, W] in `num_steps` of the 1000 timesteps, evenly spaced from 999 to 0.

    As in the published sampling of DiT, with 250 steps: betas are those of the timesteps left, the predicted picture
    is not clipped. The noise that is added to image i depends on (seed, i) alone. Raises ValueError for a number of
    steps that is not in [2, 1000].
    """
    if not 2 <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(f"num_steps {num_steps} must be in [2, {NUM_TIMESTEPS}] for objective.kind ddpm")
    scheduler = DDPMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=FIRST_BETA,
        beta_end=LAST_BETA,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(num_steps)
    draws = [named_generator(seed, f"noise while sampling image {number}") for number in range(len(x_BCHW))]
    for timestep in scheduler.timesteps:
        x_BCHW = scheduler.step(predict(x_BCHW, timestep), timestep, x_BCHW, generator=draws).prev_sample
    return x_BCHW
