"""One rank of several engines, one after the other: the buffers of their models."""

from torch import Tensor

from megadit import engines
from megadit.distributed import process_group
from megadit.recipe import Recipe


def main(recipes: list[Recipe]) -> list[dict[str, Tensor]]:
    with process_group(needed=True) as topology:
        models = [engines.build(recipe, topology).model for recipe in recipes]
        return [{name: value.clone() for name, value in model.named_buffers()} for model in models]
