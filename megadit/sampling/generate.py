"""From a run and prompts to a grid of images."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from megadit import models
from megadit.data.batch import pad_text
from megadit.data.text_encoder import TextEncoder
from megadit.parametrization.initialisation import set_multipliers
from megadit.parametrization.table import build_table
from megadit.recipe import MMDiTModel
from megadit.sampling.flow import generate
from megadit.sampling.grid import draw_grid
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
) -> Path:
    """Sample one image per prompt with the weights of a run's newest whole checkpoint; write a labelled PNG grid.

    Args:
        ema: an average's name ("ema_0.999"), "weight" for the raw weights, None for the recipe's first average.
        encoder: the text encoder that the data was packed with, where its folder is another now.

    Raises:
        ValueError: `run` is not a run, has no usable checkpoint or no such average; the encoder's weights are missing.
    """
    if not prompts:
        raise ValueError("nothing to sample: give at least one prompt")
    model, config = load_model(run, ema)
    tokens, lengths, pooled = pad_text(load_encoder(run, encoder).encode(list(prompts)))
    text = {"text": tokens, "text_lengths": lengths, "pooled": pooled}
    images = generate(model, config, text, guidance_scale, num_steps, seed)
    draw_grid(images, prompts, grid)
    return grid


def load_model(run: Path, ema: str | None = None) -> tuple[nn.Module, MMDiTModel]:
    """The model of a run with the weights of its newest whole checkpoint, fp32, for inference."""
    recipe = run_folder.load_recipe(run)
    path = checkpoint.newest_valid(run / "checkpoints")
    if path is None:
        raise ValueError(f"{run} has no usable checkpoint yet")
    averages = checkpoint.read_header(path).averages
    model = models.build(recipe.model)
    set_multipliers(model, build_table(recipe))
    model.load_state_dict(checkpoint.read_tensors(path, ema or next(iter(averages), "weight")))
    return model.eval().requires_grad_(False), recipe.model


def load_encoder(run: Path, name_or_path: str | None = None) -> TextEncoder:
    """The text encoder whose features the run was trained on; ValueError if what is there is another."""
    facts = run_folder.load_manifest(run).text
    encoder = TextEncoder.load(name_or_path or facts.encoder, facts.max_tokens)
    if encoder.weights_sha256 != facts.weights_sha256:
        raise ValueError(
            f"text encoder {name_or_path or facts.encoder} has other weights than {facts.encoder}, "
            "which the data was packed with"
        )
    return encoder
