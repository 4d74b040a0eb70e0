"""The recipe: one YAML file, one frozen tree, everything that a run is a function of."""

from megadit.recipe.comparison import Differences, differences, is_free
from megadit.recipe.loading import (
    RECIPE_FOLDER,
    all_presets,
    dump,
    load,
    parse,
    parse_text,
    resolve,
)
from megadit.recipe.schema import (
    Data,
    Encoders,
    Evaluation,
    EvaluationMetric,
    EvaluationTask,
    GenerationPrecision,
    LabelOrder,
    Parametrization,
    Recipe,
    TaskName,
    check_world_size,
)
from megadit.recipe.yaml_file import RecipeError

__all__ = [
    "RECIPE_FOLDER",
    "Data",
    "Differences",
    "Encoders",
    "Evaluation",
    "EvaluationMetric",
    "EvaluationTask",
    "GenerationPrecision",
    "LabelOrder",
    "Parametrization",
    "Recipe",
    "RecipeError",
    "TaskName",
    "all_presets",
    "check_world_size",
    "differences",
    "dump",
    "is_free",
    "load",
    "parse",
    "parse_text",
    "resolve",
]
