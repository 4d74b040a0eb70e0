"""One rank of a benchmark of two steps in each setting."""

from collections.abc import Sequence

from megadit.benchmarks import synthetic
from megadit.recipe import Recipe
from megadit.training.telemetry import Costs


def main(recipe: Recipe, settings: Sequence[synthetic.Setting]) -> list[Costs | None]:
    return [measured.costs for measured in synthetic.bench(recipe, settings, num_steps=2, text_tokens=None)]
