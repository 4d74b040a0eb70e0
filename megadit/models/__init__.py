"""Diffusion transformers as plain modules, a folder for each family.

Every model is called as `model(x_BCHW, timestep_B, dropped_B=..., **conditions)`: noisy images, timesteps in [0, 1000]
(fp32), which samples have their condition dropped, and `config.conditions.columns` of a batch.
"""

from torch import nn

from megadit.models.dit import DIT
from megadit.models.family import Conditions, Family, ForwardFlops, ModelConfig
from megadit.models.mmdit import MMDIT
from megadit.models.pixart import PIXART
from megadit.registry import Registry

__all__ = [
    "FAMILIES",
    "Conditions",
    "Family",
    "ForwardFlops",
    "ModelConfig",
    "build",
    "family_of",
    "forward_flops",
    "num_flops",
]

FAMILIES: Registry[Family] = Registry("model family")
for _family in (DIT, PIXART, MMDIT):
    FAMILIES.add(_family.name, _family)


def family_of(config: ModelConfig) -> Family:
    """The family of a model's settings."""
    return FAMILIES.get(config.family)


def build(config: ModelConfig) -> nn.Module:
    """The model that a recipe's `model` section describes, with torch's default weights."""
    return family_of(config).build(config)


def forward_flops(config: ModelConfig, num_text_tokens: int) -> ForwardFlops:
    """What one sample's forward pass takes, by blocks and the rest."""
    return family_of(config).forward_flops(config, num_text_tokens)


def num_flops(config: ModelConfig, num_text_tokens: int) -> int:
    """Floating-point operations of one sample's forward pass in training; a multiply-add is two."""
    return forward_flops(config, num_text_tokens).total
