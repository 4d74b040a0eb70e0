"""The `model` section of a DiT, and the presets of the papers."""

from collections.abc import Mapping
from typing import Any, Literal

from megadit.models.family import Conditions, ModelConfig
from megadit.node import PositiveInt


class DiTConfig(ModelConfig):
    """Class-conditional transformer with adaptive layer norm (DiT, arXiv 2212.09748)."""

    family: Literal["dit"] = "dit"
    depth: PositiveInt = 28
    head_dim: PositiveInt = 72
    num_classes: PositiveInt = 1000
    learn_sigma: bool = True  # twice the channels: the noise, and where the variance lies between its bounds
    # The timestep's lowest frequency is 10000^-((128 - 1) / (128 - shift)): 0 as published, 1 as in diffusers' class.
    timestep_freq_shift: Literal[0, 1] = 0

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def conditions(self) -> Conditions:
        return Conditions(num_classes=self.num_classes)


# Depth, width and number of heads of arXiv 2212.09748, table 1.
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

# `model.preset: DiT-XL/2` stands for these settings; others in the section override them.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    **{
        f"DiT-{size}/{patch}": {"depth": depth, "width": width, "head_dim": width // num_heads, "patch_size": patch}
        for size, (depth, width, num_heads) in _SIZES.items()
        for patch in (2, 4, 8)
    },
    **{f"DiT-muP-{width}": {"width": width} for width in (144, 288, 576, 1152)},  # of arXiv 2505.15270
}
