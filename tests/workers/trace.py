"""A process that traces one recipe after another."""

import torch
from torch import Tensor

from megadit.models import ModelConfig
from megadit.objectives import repa
from megadit.planning.trace import Traced, trace_here
from megadit.recipe import Recipe


class GivenFeatures(repa.Alignment):
    """The alignment loss against features that are there: the encoder is not part of what is traced."""

    def __init__(self, encoder: str, model: ModelConfig, device: torch.device) -> None:
        self._shape = (model.num_patches, model.feature_dim or 0)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        return torch.zeros(len(images_BCHW), *self._shape)


def main(jobs: list[tuple[Recipe, int, int]]) -> list[Traced]:
    """Of each (recipe, number of ranks, tokens of captions)."""
    repa.Alignment = GivenFeatures  # type: ignore[misc]
    return [trace_here(*job) for job in jobs]
