"""Diffusion transformers as plain modules."""

from torch import nn

from megadit.models import mmdit
from megadit.recipe import MMDiTModel

# Each family's class, and the floating-point operations of its forward pass.
FAMILIES = {"mmdit": (mmdit.MMDiT, mmdit.num_flops)}


def build(config: MMDiTModel) -> nn.Module:
    """The model that a recipe's `model` section describes, with torch's default weights."""
    return FAMILIES[config.family][0](config)


def num_flops(config: MMDiTModel, num_text_tokens: int) -> int:
    """Floating-point operations of one sample's forward pass; a multiply-add is two, a training step three passes."""
    return FAMILIES[config.family][1](config, num_text_tokens)
