"""A model family from outside of the package: an MLP mixer without attention, which takes classes."""

from typing import Literal

import torch
from torch import Tensor, nn

from megadit.models import FAMILIES, Conditions, Family, ForwardFlops, ModelConfig
from megadit.models.layers import (
    MLP,
    SINUSOID_CHANNELS,
    PatchEmbed,
    Readout,
    TimestepEmbedder,
    image_of_patches,
    modulate,
    patch_grid,
)
from megadit.models.rules import FAN_IN, N_002, ZERO, Rules


class ToyConfig(ModelConfig):
    family: Literal["toy_mixer"] = "toy_mixer"
    head_dim: int = 16
    num_kinds: int

    @property
    def conditions(self) -> Conditions:
        return Conditions(num_classes=self.num_kinds)


class ToyMixer(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = PatchEmbed(config.in_channels, config.patch_size, config.width)
        self.time = TimestepEmbedder(config.width)
        self.kinds = nn.Embedding(config.num_kinds + 1, config.width)
        self.blocks = nn.ModuleList(ToyBlock(config) for _ in range(config.depth))
        self.out = Readout(config.width, config.out_channels * config.patch_size**2)

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, *, labels: Tensor, dropped_B: Tensor | None = None) -> Tensor:
        grid, dtype = patch_grid(x_BCHW, self.config), self.patches.proj.weight.dtype
        if dropped_B is not None:
            labels = torch.where(dropped_B, self.config.num_kinds, labels)
        x_BTD = self.patches(x_BCHW.to(dtype))
        condition_BD = self.time(timestep_B, dtype) + self.kinds(labels)
        for block in self.blocks:
            x_BTD = block(x_BTD, condition_BD)
        return image_of_patches(self.out(x_BTD), self.config.out_channels, self.config.patch_size, grid)


class ToyBlock(nn.Module):
    """Tokens see each other through their mean."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.shift = nn.Linear(config.width, config.width)
        self.mix = nn.Linear(config.width, config.width)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width, config.width, "silu")

    def forward(self, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        shift_B1D = self.shift(condition_BD)[:, None]
        x_BTD = x_BTD + self.mix(modulate(x_BTD, shift_B1D, torch.zeros_like(shift_B1D))).mean(1, keepdim=True)
        return x_BTD + self.mlp(modulate(x_BTD, shift_B1D, torch.zeros_like(shift_B1D)))


def forward_flops(config: ToyConfig, num_text_tokens: int) -> ForwardFlops:
    D, T, F = config.width, config.num_patches, config.in_channels * config.patch_size**2
    block = D * D + T * D * D * (1 + 2 * config.mlp_ratio)
    first_layers = (T * F + SINUSOID_CHANNELS) * D
    return ForwardFlops((2 * block,) * config.depth, 2 * (first_layers + D * D + T * D * F), 2 * first_layers, 0)


_RULES: Rules = {"out.weight": ZERO, "kinds.weight": N_002, "*.weight": FAN_IN, "*.bias": ZERO}

FAMILIES.add(
    "toy_mixer",
    Family(
        config=ToyConfig,
        build=ToyMixer,
        forward_flops=forward_flops,
        initial=dict.fromkeys(("mup, paper", "mup, zero", "sp"), _RULES),
        readout="out",
        presets={"Toy-32": {"width": 32, "depth": 2}},
    ),
)
