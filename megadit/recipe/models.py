"""The `model` section: one shape of settings per family, and the presets of the papers.

Sizes count what the field counts: `width` in features, `depth` in blocks, `input_size` in pixels or latent pixels.
Under muP `head_dim` is fixed: a wider model has more heads.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megadit.node import Node, PositiveInt


class _Sizes(Node):
    """What all families share."""

    input_size: PositiveInt = 32  # side of the square input; 32 latent pixels are 256 pixels of the usual autoencoder
    in_channels: PositiveInt = 4
    patch_size: PositiveInt = 2
    width: PositiveInt
    depth: PositiveInt
    head_dim: PositiveInt
    mlp_ratio: PositiveInt = 4

    @model_validator(mode="after")
    def _check(self) -> "_Sizes":
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} must be a multiple of head_dim {self.head_dim}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}")
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 (two-dimensional sine-cosine positions)")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} must be a multiple of patch_size {self.patch_size}")
        return self

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim


class DiTModel(_Sizes):
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


class PixArtModel(_Sizes):
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


class RepaHead(Node):
    """A head on the image tokens after a block, which predicts features of a pretrained encoder (arXiv 2410.06940)."""

    block: PositiveInt = 8  # counted from 1
    feature_dim: PositiveInt = 768  # 768 are those of DINOv2-B


class MMDiTModel(_Sizes):
    """Joint image/text transformer (SD3, arXiv 2403.03206)."""

    family: Literal["mmdit"] = "mmdit"
    head_dim: PositiveInt = 64
    text_dim: PositiveInt = 4096  # features of one text token
    pooled_dim: PositiveInt = 4096  # features of the pooled text vector
    repa: RepaHead | None = None

    @model_validator(mode="after")
    def _check_repa(self) -> "MMDiTModel":
        if self.repa and self.repa.block > self.depth:
            raise ValueError(f"repa.block {self.repa.block} must be at most depth {self.depth}")
        return self

    @property
    def out_channels(self) -> int:
        return self.in_channels


ModelConfig = Annotated[DiTModel | PixArtModel | MMDiTModel, Field(discriminator="family")]

# Depth, width and number of heads of arXiv 2212.09748, table 1.
_DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

# `model.preset: DiT-XL/2` stands for these settings; others in the section override them.
PRESETS: dict[str, dict[str, Any]] = {
    f"DiT-{size}/{patch}": {
        "family": "dit",
        "depth": depth,
        "width": width,
        "head_dim": width // num_heads,
        "patch_size": patch,
    }
    for size, (depth, width, num_heads) in _DIT_SIZES.items()
    for patch in (2, 4, 8)
}
# The widths of arXiv 2505.15270: DiT-muP, PixArt-alpha, and MMDiT with 36 * 19 * width^2 weights in its blocks.
PRESETS |= {f"DiT-muP-{width}": {"family": "dit", "width": width} for width in (144, 288, 576, 1152)}
PRESETS |= {f"PixArt-{width}": {"family": "pixart", "width": width} for width in (288, 1152)}
PRESETS |= {
    f"MMDiT-{width}": {"family": "mmdit", "depth": 19, "width": width, "head_dim": 128}
    for width in (512, 1024, 2048, 3072, 5120)
}
