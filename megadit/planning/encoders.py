"""The memory of frozen encoders in the trainer, from their configurations alone.

Weights are counted where the folder of an encoder is at hand, and estimated from the number of its features where it
is not. What encoding takes for a moment is an estimate in any case.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import nn

from megadit.planning.in_flight import FP32_BYTES, Held, Moment
from megadit.recipe import Recipe

# Parameters by number of features: MiniLM-L6, and the encoders of T5 (arXiv 1910.10683) and DINOv2 (arXiv 2304.07193).
TEXT_PARAMETERS = {384: 22_700_000, 768: 110_000_000, 1024: 335_000_000, 2048: 1_220_000_000, 4096: 4_760_000_000}
IMAGE_PARAMETERS = {384: 22_100_000, 768: 86_600_000, 1024: 304_000_000, 1536: 1_140_000_000}
VAE_PARAMETERS = 84_000_000  # of Stable Diffusion's, and of its successors with 16 channels
# Of the first level of its encoder, at the resolution of the picture: channels, and maps that live at once.
VAE_CHANNELS, VAE_MAPS, VAE_PICTURES, VAE_DOWNSAMPLING = 128, 4, 16, 8
TEXT_CAPTIONS, TEXT_WIDTHS = 64, 16  # encoded at once; numbers for each token in widths of the encoder


def weights(recipe: Recipe, num_ranks: int) -> tuple[Held, ...]:
    """What lies on the device all the time. Raises ValueError for an encoder that nothing is known of."""
    found, encoders, width = [], recipe.encoders, _bytes_of_number(recipe)
    if encoders and encoders.text:
        share = -(-_text_parameters(recipe, encoders.text) // (num_ranks if encoders.sharded else 1))
        found.append(Held("text encoder", width * share))
    if encoders and encoders.vae:
        found.append(Held("autoencoder", width * (_count(_autoencoder, encoders.vae) or VAE_PARAMETERS)))
    if recipe.objective.image_encoder:
        known = IMAGE_PARAMETERS.get(recipe.model.feature_dim or 0)
        number = _count(_image_encoder, recipe.objective.image_encoder) or known
        if number is None:
            raise ValueError(
                f"image encoder {recipe.objective.image_encoder}: no such folder, so its size is not known"
            )
        found.append(Held("image encoder", width * number))
    return tuple(found)


def working(recipe: Recipe, micro_batch: int) -> Iterator[Moment]:
    """What encoding takes, before the step: gradients are not there yet."""
    encoders, width = recipe.encoders, _bytes_of_number(recipe)
    if encoders and encoders.text:
        features = recipe.model.conditions.text_dim or 0
        tokens = min(micro_batch, TEXT_CAPTIONS) * encoders.max_tokens
        yield (
            "encoding of captions",
            (Held("text encoder at work (estimate)", width * tokens * features * TEXT_WIDTHS),),
        )
    if encoders and encoders.vae:
        pixels = (recipe.model.input_size * VAE_DOWNSAMPLING) ** 2 * min(micro_batch, VAE_PICTURES)
        bytes_at_once = width * pixels * VAE_CHANNELS * VAE_MAPS
        yield "encoding of pictures", (Held("autoencoder at work (estimate)", bytes_at_once),)


def _bytes_of_number(recipe: Recipe) -> int:
    """Encoders compute in bf16 where training does."""
    return 2 if recipe.training.precision == "bf16" else FP32_BYTES


def _text_parameters(recipe: Recipe, text: str) -> int:
    features = recipe.model.conditions.text_dim or 0
    if text == "minilm":
        return TEXT_PARAMETERS[384]
    number = _count(_text_encoder, text) or TEXT_PARAMETERS.get(features)
    if number is None:
        raise ValueError(f"text encoder {text}: no such folder, so its size is not known")
    return number


@cache
def _count(build: Callable[[str], nn.Module], folder: str) -> int | None:
    """Parameters of the model that a configuration describes; None where there is no such folder."""
    if not (Path(folder) / "config.json").exists():
        return None
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(folder).parameters())


def _text_encoder(folder: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForTextEncoding  # takes seconds, and most plans need none of it

    built: nn.Module = AutoModelForTextEncoding.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    return built


def _image_encoder(folder: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    built: nn.Module = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    return built


def _autoencoder(folder: str) -> nn.Module:
    from diffusers import AutoencoderKL

    built: nn.Module = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, local_files_only=True))
    return built
