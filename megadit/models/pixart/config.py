"""The `model` section of a PixArt-alpha, and the presets of the paper."""

from collections.abc import Mapping
from typing import Any, Literal

from megadit.models.family import Conditions, ModelConfig
from megadit.node import PositiveInt


class PixArtConfig(ModelConfig):
    """Text-conditional transformer with cross-attention and one shared modulation (PixArt-alpha, arXiv 2310.00426)."""

    family: Literal["pixart"] = "pixart"
    depth: PositiveInt = 28
    head_dim: PositiveInt = 72
    text_dim: PositiveInt = 4096  # features of one text token; 4096 are those of T5-XXL
    max_text_tokens: PositiveInt = 120
    learn_sigma: bool = True

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def conditions(self) -> Conditions:
        return Conditions(text_dim=self.text_dim, max_text_tokens=self.max_text_tokens)


# The widths of arXiv 2505.15270.
PRESETS: Mapping[str, Mapping[str, Any]] = {f"PixArt-{width}": {"width": width} for width in (288, 1152)}
