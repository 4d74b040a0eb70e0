"""From a run and prompts to a grid of images."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megadit.batch import pad_text
from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.encoders.text_encoder import TextEncoder
from megadit.parametrization.base_shapes import meta_model
from megadit.parametrization.initialisation import set_multipliers
from megadit.parametrization.table import build_table
from megadit.randomness import Purpose, generator, named_generator
from megadit.recipe import Recipe
from megadit.sampling.grid import draw_grid
from megadit.sampling.guidance import guide
from megadit.sampling.samplers import choose
from megadit.training import checkpoint, run_folder


def sample(
    run: Path,
    prompts: Sequence[str],
    grid: Path,
    ema: str | None = None,
    guidance_scale: float = 4.0,
    num_steps: int = 25,
    seed: int = 0,
    encoder: str | None = None,
    vae: str | None = None,
) -> Path:
    """Sample one image per prompt with the weights of a run's newest whole checkpoint; write a labelled PNG grid.

    Args:
        prompts: captions; for a class-conditional model the names of classes, or their numbers.
        ema: an average's name ("ema_0.999"), "weight" for the raw weights, None for the recipe's first average.
        encoder: the text encoder that the data was packed with, where its folder is another now.
        vae: folder of the autoencoder of a model that makes latents.

    Raises:
        ValueError: `run` is not a run, has no usable checkpoint or no such average; the weights of the encoder or the
            autoencoder are missing or others than the model's; there is no such class.
    """
    if not prompts:
        raise ValueError("nothing to sample: give at least one prompt")
    model, recipe = load_model(run, ema)
    decoder = load_decoder(vae, recipe) if vae is not None else None
    if decoder is None and recipe.model.in_channels != 3:
        raise ValueError(
            f"the model makes latents of {recipe.model.in_channels} channels: give the autoencoder's folder"
        )
    conditions = encode_prompts(run, recipe, prompts, encoder)
    images = generate(model, recipe, conditions, guidance_scale, num_steps, seed)
    draw_grid(decoder.decode(images) if decoder else images, prompts, grid)
    return grid


@torch.no_grad()
def generate(
    model: nn.Module,
    recipe: Recipe,
    conditions: Mapping[str, Tensor],
    guidance_scale: float,
    num_steps: int,
    seed: int,
) -> Tensor:
    """Images [B, C, H, W] under B conditions, about in [-1, 1] (latents: in their units), on the conditions' device.

    Image i depends on (seed, i) and its own condition alone; the sampler is the objective's default. For `conditions`
    see `megadit.models.Conditions`, for `guidance_scale` see `guide`. Raises ValueError for a number of steps that
    cannot be.
    """
    sampler = choose(recipe.objective, num_steps=num_steps)
    config, first = recipe.model, next(iter(conditions.values()))
    shape = (config.in_channels, config.input_size, config.input_size)
    noise = [
        generator(seed, Purpose.SAMPLING_NOISE, number).standard_normal(shape, np.float32)
        for number in range(len(first))
    ]
    x_BCHW = torch.from_numpy(np.stack(noise)).to(first.device)
    predict = guide(model, conditions, guidance_scale, config.in_channels)
    draws = [named_generator(seed, f"noise while sampling image {number}") for number in range(len(first))]
    return sampler.sample(predict, x_BCHW, draws)


def load_model(run: Path, ema: str | None = None) -> tuple[nn.Module, Recipe]:
    """The model of a run with the weights of its newest whole checkpoint, fp32, for inference; its stage's recipe."""
    run_folder.load_recipe(run)  # says where `run` is none
    path = checkpoint.newest_valid(run / "checkpoints")
    if path is None:
        raise ValueError(f"{run} has no usable checkpoint yet")
    recipe = run_folder.recipe_of(path)
    return load_weights(recipe, path, ema or default_weights(path)), recipe


def default_weights(path: Path) -> str:
    """The name of a checkpoint's first average, or "weight" where there is none."""
    return next(iter(checkpoint.read_header(path).averages), "weight")


def load_weights(recipe: Recipe, path: Path, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The recipe's model with the weights `kind` of the checkpoint `path` of a run, for inference. Raises ValueError.

    With weights in bf16 it computes as training in bf16 does, where engines gather weights in bf16 and leave times and
    fixed tables in fp32. On the CPU there is never more than the checkpoint in fp32.
    """
    model = meta_model(recipe.model)
    specs = build_table(recipe)
    run_folder.require_same_table(path.parents[1], specs)
    set_multipliers(model, specs)
    try:
        weights = checkpoint.read_tensors(path, kind)
    except checkpoint.DamageError as damage:
        raise ValueError(f"checkpoint {path} is damaged: {damage}") from damage
    for name in weights:
        weights[name] = weights[name].to(dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected and not set(missing) & dict(model.named_parameters()).keys()  # tables are not in checkpoints
    return model.eval().requires_grad_(False)


def encode_prompts(run: Path, recipe: Recipe, prompts: Sequence[str], encoder: str | None = None) -> dict[str, Tensor]:
    """The conditions of a run's model for B prompts, by name; see `sample`."""
    return load_conditioner(run, recipe, encoder)(prompts)


def load_conditioner(
    run: Path,
    recipe: Recipe,
    encoder: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """What makes the conditions of a run's model, by name, of B prompts; see `sample`.

    The text encoder runs on `device` with weights in `dtype`; features are in fp32 in any case.
    """
    if recipe.model.conditions.num_classes is not None:
        classes = run_folder.load_manifest(run).labels
        return lambda prompts: {"labels": class_numbers(prompts, classes)}
    names, text_encoder = recipe.model.conditions.columns, load_encoder(run, recipe, encoder, device, dtype)

    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens, lengths, pooled = pad_text(text_encoder.encode(list(prompts)))
        features = {"text": tokens, "text_lengths": lengths, "pooled": pooled}
        return {name: features[name] for name in names}

    return encode


def class_numbers(prompts: Sequence[str], labels: Sequence[str]) -> Tensor:
    """The places of classes in `labels`, int64 [B], from their names or their numbers; ValueError for unknown ones."""
    numbers = {str(number): number for number in range(len(labels))}
    numbers |= {name: number for number, name in enumerate(labels)}  # a class may be called "7"
    for prompt in prompts:
        if prompt not in numbers:
            nearest = difflib.get_close_matches(prompt, labels, n=1, cutoff=0)[0]
            raise ValueError(
                f"no class {prompt!r}: did you mean {nearest!r}? "
                f"Give the names of classes, or numbers from 0 to {len(labels) - 1}"
            )
    return torch.tensor([numbers[prompt] for prompt in prompts])


def load_decoder(vae: str, recipe: Recipe, device: torch.device | None = None) -> Autoencoder:
    """The autoencoder in the folder `vae`, on `device`; ValueError if its latents are not the model's."""
    decoder, channels = Autoencoder.load(vae, device), recipe.model.in_channels
    if decoder.channels != channels:
        raise ValueError(
            f"autoencoder {vae!r} has latents of {decoder.channels} channels, model.in_channels is {channels}"
        )
    return decoder


def load_encoder(
    run: Path,
    recipe: Recipe,
    name_or_path: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """The text encoder whose features the run was trained on; ValueError if what is there is another."""
    facts = run_folder.load_manifest(run).text
    if facts is None:
        assert recipe.encoders is not None and recipe.encoders.text is not None, "models with text are trained on text"
        return TextEncoder.load(name_or_path or recipe.encoders.text, recipe.encoders.max_tokens, device, dtype)
    encoder = TextEncoder.load(name_or_path or facts.encoder, facts.max_tokens, device, dtype)
    if encoder.weights_sha256 != facts.weights_sha256:
        raise ValueError(
            f"text encoder {name_or_path or facts.encoder} has other weights than {facts.encoder}, "
            "which the data was packed with"
        )
    return encoder
