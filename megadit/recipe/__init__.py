"""The recipe: one YAML file, one frozen tree, everything that a run is a function of."""

from megadit.recipe.loading import (
    RECIPE_FOLDER,
    RecipeError,
    differences,
    dump,
    is_free,
    load,
    parse,
    resolve,
)
from megadit.recipe.models import PRESETS, DiTModel, MMDiTModel, ModelConfig, PixArtModel, RepaHead
from megadit.recipe.schema import (
    Data,
    DDPMObjective,
    Encoders,
    FlowObjective,
    Objective,
    Optimizer,
    Parametrization,
    Recipe,
    RepaLoss,
    check_world_size,
)

__all__ = [
    "PRESETS",
    "RECIPE_FOLDER",
    "DDPMObjective",
    "Data",
    "DiTModel",
    "Encoders",
    "FlowObjective",
    "MMDiTModel",
    "ModelConfig",
    "Objective",
    "Optimizer",
    "Parametrization",
    "PixArtModel",
    "Recipe",
    "RecipeError",
    "RepaHead",
    "RepaLoss",
    "check_world_size",
    "differences",
    "dump",
    "is_free",
    "load",
    "parse",
    "resolve",
]
