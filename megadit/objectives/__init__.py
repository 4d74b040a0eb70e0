"""Objectives: what a network learns to predict, from which noisy pictures, and how far off it is."""

from typing import Protocol

import torch
from torch import Tensor, nn

from megadit.batch import Batch
from megadit.objectives.flow import Flow
from megadit.recipe import Recipe


class Objective(Protocol):
    """Timesteps are fp32 in [0, 1000], where 0 is the picture, as in diffusers' schedulers."""

    def timesteps(self, uniform_B: Tensor) -> Tensor:
        """Timesteps of the training distribution from uniform draws in [0, 1), in their order."""
        ...

    def timesteps_at(self, fraction_B: Tensor) -> Tensor:
        """Timesteps at fractions in [0, 1) of the time axis."""
        ...

    def losses(self, model: nn.Module, batch: Batch, timestep_B: Tensor) -> Tensor:
        """The loss of each sample, fp32 [B].

        The condition of a sample is dropped where its uniform draw is below the recipe's `condition_dropout`:
        classifier-free guidance (arXiv 2207.12598) needs the unconditional model too.
        """
        ...

    def targets(self, batch: Batch) -> Tensor:
        """What the network should predict, [B, C, H, W]."""
        ...


def build(recipe: Recipe, device: torch.device) -> Objective:
    """The objective of a recipe. Raises ValueError where a pretrained encoder that it needs cannot be loaded."""
    if recipe.objective.kind == "flow":
        return Flow(recipe.objective, recipe.model, device)
    from megadit.objectives.ddpm import DDPM

    return DDPM(recipe.objective, recipe.model, device)
