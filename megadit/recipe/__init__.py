"""The recipe: one YAML file, one frozen tree, everything that a run is a function of."""

from megadit.recipe.comparison import Differences, differences, mark_of
from megadit.recipe.continuation import compare_pasts, require_same_past
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
    average_names,
    check_world_size,
)
from megadit.recipe.stages import Stage, one_stage, plan, stages_of
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
    "Stage",
    "TaskName",
    "all_presets",
    "average_names",
    "check_world_size",
    "compare_pasts",
    "differences",
    "dump",
    "load",
    "mark_of",
    "one_stage",
    "parse",
    "parse_text",
    "plan",
    "require_same_past",
    "resolve",
    "stages_of",
]
