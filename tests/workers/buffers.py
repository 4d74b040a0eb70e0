"""One rank of an engine: the buffers of its model."""

from torch import Tensor

from megadit import engines
from megadit.recipe import Recipe
from megadit.training.ranks import process_group


def main(recipe: Recipe) -> dict[str, Tensor]:
    with process_group(needed=recipe.engine.kind != "single"):
        return {name: value.clone() for name, value in engines.build(recipe).model.named_buffers()}
