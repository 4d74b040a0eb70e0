"""Classifier-free guidance (arXiv 2207.12598): what a sampler sees of a model and its conditions."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megadit.objectives.objective import Predict


def guide(model: nn.Module, conditions: Mapping[str, Tensor], guidance_scale: float, num_channels: int) -> Predict:
    """The model's prediction under B conditions, pushed away from the one with the conditions dropped.

    Guided are the first `num_channels` channels; what comes after them is that of the conditional model. They are all
    channels of the input in PixArt-alpha and in diffusers, where only a learned variance comes after them, and three
    of four in DiT's published sampling (its forward_with_cfg: "for exact reproducibility reasons").

    Args:
        guidance_scale: 1 is the conditional model alone, 0 the unconditional one (2207.12598, whose w is scale - 1).
    """
    both = {name: torch.cat([value, value]) for name, value in conditions.items()}

    def predict(x_BCHW: Tensor, timestep: Tensor) -> Tensor:
        B = len(x_BCHW)
        timestep_B = timestep.to(x_BCHW.device, torch.float32).expand(B)
        if guidance_scale == 1:
            return model(x_BCHW, timestep_B, **conditions).float()
        dropped_2B = torch.arange(2 * B, device=x_BCHW.device) >= B
        predictions = model(x_BCHW.repeat(2, 1, 1, 1), timestep_B.repeat(2), **both, dropped_B=dropped_2B).float()
        conditional, unconditional = predictions.chunk(2)
        guided = torch.lerp(unconditional[:, :num_channels], conditional[:, :num_channels], guidance_scale)
        return torch.cat([guided, conditional[:, num_channels:]], dim=1)

    return predict
