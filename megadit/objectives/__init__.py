"""Objectives, a file for each: what a network learns to predict, from which noisy pictures, and how far off it is."""

import torch

from megadit.models import ModelConfig
from megadit.objectives.ddpm import DDPM_KIND
from megadit.objectives.flow import FLOW_KIND
from megadit.objectives.objective import Losses, Objective, ObjectiveConfig, ObjectiveKind
from megadit.registry import Registry

__all__ = ["OBJECTIVES", "Losses", "Objective", "ObjectiveConfig", "ObjectiveKind", "build", "kind_of", "sampler_names"]

OBJECTIVES: Registry[ObjectiveKind] = Registry("objective")
for _kind in (FLOW_KIND, DDPM_KIND):
    OBJECTIVES.add(_kind.name, _kind)


def kind_of(config: ObjectiveConfig) -> ObjectiveKind:
    """The kind of an objective's settings."""
    return OBJECTIVES.get(config.kind)


def build(
    config: ObjectiveConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> Objective:
    """The objective of a recipe, whose frozen encoders compute in `dtype`.

    Raises ValueError where a pretrained encoder that it needs cannot be loaded.
    """
    return kind_of(config).build(config, model, device, dtype)


def sampler_names() -> list[str]:
    """The samplers of all objectives."""
    return sorted({name for kind in OBJECTIVES.names for name in OBJECTIVES.get(kind).samplers})
