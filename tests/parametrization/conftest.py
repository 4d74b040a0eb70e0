"""Recipes of the parametrization tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megadit import recipe
from megadit.recipe import Recipe

CONDITIONS = {
    "dit": {"num_classes": 7},
    "pixart": {"text_dim": 12, "max_text_tokens": 5},
    "mmdit": {"text_dim": 12, "pooled_dim": 10},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small only lose by threads, and on a busy machine they lose a factor of ten."""
    torch.set_num_threads(1)


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """A small muP recipe of a family, with changed sections."""

    def make(family: str = "mmdit", **sections: dict[str, Any]) -> Recipe:
        sizes = {"input_size": 8, "in_channels": 3, "patch_size": 2, "width": 64, "depth": 2, "head_dim": 8}
        tree: dict[str, Any] = {
            "name": "small",
            "model": {"family": family} | sizes | CONDITIONS[family],
            "objective": {"kind": "flow" if family == "mmdit" else "ddpm"},
            "parametrization": {"kind": "mup", "base_width": 16},
            "data": {"url": "file:///nowhere"},
            "optimizer": {"lr": 2.0**-6, "weight_decay": 0.1},
            "training": {"num_images": 16, "batch_size": 8},
            "checkpoints": {"every_images": 16},
        }
        for section, changes in sections.items():
            tree[section] = tree[section] | changes
        return recipe.parse(tree)

    return make
