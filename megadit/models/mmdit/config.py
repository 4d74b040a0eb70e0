"""The `model` section of an MMDiT, and the presets of the paper."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from megadit.models.family import Conditions, ModelConfig
from megadit.node import Node, PositiveInt


class RepaHeadConfig(Node):
    """A head on the image tokens after a block, which predicts features of a pretrained encoder (arXiv 2410.06940)."""

    block: PositiveInt = 8  # counted from 1
    feature_dim: PositiveInt = 768  # 768 are those of DINOv2-B


class MMDiTConfig(ModelConfig):
    """Joint image/text transformer (SD3, arXiv 2403.03206)."""

    family: Literal["mmdit"] = "mmdit"
    head_dim: PositiveInt = 64
    text_dim: PositiveInt = 4096  # features of one text token
    pooled_dim: PositiveInt = 4096  # features of the pooled text vector
    repa: RepaHeadConfig | None = None

    @model_validator(mode="after")
    def _check_repa(self) -> "MMDiTConfig":
        if self.repa and self.repa.block > self.depth:
            raise ValueError(f"repa.block {self.repa.block} must be at most depth {self.depth}")
        return self

    def with_depth(self, depth: int) -> Self:
        """The same model of so many blocks; of those after the head of REPA, two stay where there are as many."""
        if self.repa is None:
            return self.model_copy(update={"depth": depth})
        block = max(1, depth - min(self.depth - self.repa.block, 2))
        return self.model_copy(update={"depth": depth, "repa": self.repa.model_copy(update={"block": block})})

    @property
    def feature_dim(self) -> int | None:
        return self.repa.feature_dim if self.repa else None

    @property
    def conditions(self) -> Conditions:
        return Conditions(text_dim=self.text_dim, pooled_dim=self.pooled_dim)


# The widths of arXiv 2505.15270, with 36 * 19 * width^2 weights in the blocks.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    f"MMDiT-{width}": {"depth": 19, "width": width, "head_dim": 128} for width in (512, 1024, 2048, 3072, 5120)
}
