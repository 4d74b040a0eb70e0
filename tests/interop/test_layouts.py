"""State dicts of ours and of diffusers map to each other without loss, for every family."""

from collections.abc import Callable

import pytest
import torch

from megadit import models
from megadit.interop.diffusers import peer
from megadit.interop.layouts import from_diffusers, to_diffusers

FAMILIES = ("dit", "pixart", "mmdit")
FIXED = {"pos_embed", "y_embedder.y_embedding"}


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_and_names(family: str, make_recipe: Callable, random_model: Callable) -> None:
    recipe = make_recipe(family)
    ours = random_model(recipe).state_dict()
    theirs = to_diffusers(recipe.model, ours)
    shapes = {name: tensor.shape for name, tensor in peer(recipe.model).named_parameters()}
    assert {name: tensor.shape for name, tensor in theirs.items()} == shapes
    back = from_diffusers(recipe.model, theirs)
    assert back.keys() == ours.keys() - FIXED
    for name, tensor in back.items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_tensors_are_named(family: str, make_recipe: Callable, random_model: Callable) -> None:
    recipe = make_recipe(family)
    ours = random_model(recipe).state_dict()
    extra = {**ours, "stray": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 is unexpected \(stray\)"):
        to_diffusers(recipe.model, extra)
    theirs = to_diffusers(recipe.model, ours)
    del theirs["pos_embed.proj.bias"]
    with pytest.raises(ValueError, match=r"1 is missing \(pos_embed.proj.bias\)"):
        from_diffusers(recipe.model, theirs)


def test_a_dit_with_different_embeddings_per_block_is_refused(make_recipe: Callable) -> None:
    """As diffusers' class initialises them; no published DiT has that."""
    config = make_recipe("dit").model
    with pytest.raises(ValueError, match="different timestep or label embeddings"):
        from_diffusers(config, peer(config).state_dict())


def test_repa_head_is_left_out(make_recipe: Callable, random_model: Callable) -> None:
    config = make_recipe("mmdit").model
    with_head = type(config).model_validate(config.model_dump() | {"repa": {"block": 1, "feature_dim": 12}})
    state = models.build(with_head).state_dict()
    assert any(name.startswith("repa_head.") for name in state)
    assert to_diffusers(with_head, state).keys() == {name for name, _ in peer(config).named_parameters()}
