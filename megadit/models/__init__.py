"""Diffusion transformers as plain modules.

Every model is called as `model(x_BCHW, timestep_B, dropped_B=..., **conditions)`: noisy images, timesteps in [0, 1000]
(fp32), which samples have their condition dropped, and what CONDITIONS names, as columns of a batch.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from megadit.models import dit, mmdit, pixart
from megadit.recipe import ModelConfig

# Each family's class, and the floating-point operations of its forward pass.
FAMILIES: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any, int], int]]] = {
    "dit": (dit.DiT, dit.num_flops),
    "pixart": (pixart.PixArt, pixart.num_flops),
    "mmdit": (mmdit.MMDiT, mmdit.num_flops),
}
CONDITIONS = {"dit": ("labels",), "pixart": ("text", "text_lengths"), "mmdit": ("text", "text_lengths", "pooled")}


def build(config: ModelConfig) -> nn.Module:
    """The model that a recipe's `model` section describes, with torch's default weights."""
    return FAMILIES[config.family][0](config)


def num_flops(config: ModelConfig, num_text_tokens: int) -> int:
    """Floating-point operations of one sample's forward pass; a multiply-add is two, a training step three passes."""
    return FAMILIES[config.family][1](config, num_text_tokens)
