"""One rank of an engine: the buffers of its model."""

from torch import Tensor

from megadit import engines
from megadit.distributed import process_group
from megadit.recipe import Recipe


def main(recipe: Recipe) -> dict[str, Tensor]:
    with process_group(recipe.engine.kind != "single", num_replicas=recipe.engine.num_replicas) as topology:
        return {name: value.clone() for name, value in engines.build(recipe, topology).model.named_buffers()}
