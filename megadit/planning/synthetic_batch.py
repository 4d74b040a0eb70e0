"""Batches of noise, where only their shapes matter."""

import torch

from megadit.batch import Batch
from megadit.models import ModelConfig
from megadit.recipe import Recipe

DEFAULT_TEXT_TOKENS = 77
PIXELS_OF_LATENT = 8  # a side, of the usual autoencoders


def longest_text(model: ModelConfig) -> int:
    """The most text tokens that a model takes, or as many as CLIP gives where there is no bound."""
    return model.conditions.max_text_tokens or DEFAULT_TEXT_TOKENS


def synthetic_batch(recipe: Recipe, size: int, text_tokens: int | None, device: torch.device) -> Batch:
    """Normal noise in place of `size` pictures, with captions of `text_tokens` tokens; nothing is dropped.

    It has features of an image encoder where the objective needs them and names no encoder to compute them with.
    """
    model = recipe.model
    taken = model.conditions
    tokens = longest_text(model) if text_tokens is None else text_tokens
    picture = (size, model.in_channels, model.input_size, model.input_size)
    online, needed = recipe.objective.image_encoder, recipe.objective.needs_features
    features = (model.num_patches, model.feature_dim or 0) if needed and not online else (0, 0)
    side = PIXELS_OF_LATENT * model.input_size
    pixels = (3, side, side) if online and model.in_channels != 3 else (0,)
    generator = torch.Generator().manual_seed(recipe.seed)
    batch = Batch(
        images=torch.randn(picture, generator=generator),
        text=torch.randn(size, tokens, taken.text_dim or 1, generator=generator),
        text_lengths=torch.full((size,), tokens),
        pooled=torch.randn(size, taken.pooled_dim or 1, generator=generator),
        labels=torch.zeros(size, dtype=torch.int64),
        noise=torch.randn(picture, generator=generator),
        timestep_uniform=torch.rand(size, generator=generator),
        drop_uniform=torch.ones(size),
        epoch=torch.zeros(size, dtype=torch.int64),
        sample=torch.arange(size),
        replaced=torch.zeros(size, dtype=torch.int64),
        features=torch.randn(size, *features, generator=generator),
        pixels=torch.randn(size, *pixels, generator=generator),
    )
    return batch.to(device)
