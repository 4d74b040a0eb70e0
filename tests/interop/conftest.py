"""Tiny recipes of each family, and models in which no weight is at a value that hides a mistake (0 or 1)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megadit import models
from megadit.recipe import Recipe, parse

MODELS: dict[str, dict[str, Any]] = {
    "dit": {"family": "dit", "head_dim": 8, "depth": 2, "timestep_freq_shift": 1},
    "pixart": {"family": "pixart", "head_dim": 16, "depth": 2, "text_dim": 24, "max_text_tokens": 6},
    "mmdit": {"family": "mmdit", "head_dim": 16, "depth": 3, "text_dim": 24, "pooled_dim": 20, "in_channels": 16},
}
MULTIPLIER = 0.37


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """A recipe of a family, with changes to its model section."""

    def make(family: str, objective: str | None = None, **changes: Any) -> Recipe:
        return parse(
            {
                "name": "tiny",
                "model": {"input_size": 8, "width": 32, **MODELS[family], **changes},
                "parametrization": {"kind": "mup", "base_width": 16},
                "objective": {"kind": objective or ("flow" if family == "mmdit" else "ddpm")},
                "data": {"url": "file:///nowhere", "num_streams": 1},
                "optimizer": {"lr": "2^-7"},
                "training": {"num_images": 8, "batch_size": 8},
                "checkpoints": {"every_images": 8},
            }
        )

    return make


@pytest.fixture
def random_model() -> Callable[[Recipe], nn.Module]:
    """A model whose readout has a multiplier other than 1."""

    def make(recipe: Recipe) -> nn.Module:
        torch.manual_seed(0)
        model = models.build(recipe.model).requires_grad_(False)
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim > 1 and "table" not in name
            parameter.normal_(std=parameter[0].numel() ** -0.5 if is_matrix else 0.2)
        model.get_submodule(models.family_of(recipe.model).readout).multiplier = MULTIPLIER
        return model

    return make
