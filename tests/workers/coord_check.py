"""One rank of a coordinate check."""

from megadit.recipe import Recipe
from megadit.tuning.coord_check import CoordCheck, coord_check


def main(recipe: Recipe, widths: list[int], num_steps: int, num_seeds: int) -> CoordCheck:
    return coord_check(recipe, widths, num_steps, num_seeds)
