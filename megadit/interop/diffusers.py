"""Models as diffusers has them: the class of the same architecture, and folders that its pipelines load.

A folder that `export` writes has `transformer/`, `scheduler/` and a `model_index.json` without the components that are
not ours (autoencoder, text encoders); those are passed to the pipeline's `from_pretrained`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from megadit import models
from megadit.files import write_text
from megadit.interop.layouts import THEIR_BUFFERS, format_of, to_diffusers
from megadit.interop.strict import load_strictly
from megadit.models import ModelConfig
from megadit.models.diffusers_format import Pipeline
from megadit.recipe import Recipe


def peer(config: ModelConfig) -> Any:
    """The diffusers model of the same architecture and sizes, with random weights.

    Raises ValueError for a size that the class of diffusers cannot have, and for a family that diffusers does not have.
    """
    if config.mlp_ratio != 4:
        raise ValueError(f"the transformers of diffusers have mlp_ratio 4, not {config.mlp_ratio}")
    sizes: dict[str, Any] = {
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
    }
    return format_of(config).peer(config, sizes)


def export(
    recipe: Recipe,
    weights: Mapping[str, Tensor],
    multiplier: float,
    folder: Path,
    allow_timestep_mismatch: bool = False,
) -> None:
    """Write a model as a folder of diffusers, fp32, the readout's multiplier folded into its weight.

    For PixArt, `null_caption.safetensors` holds the null caption as `negative_prompt_embeds`, to be passed with the
    prompt's own mask as `negative_prompt_attention_mask`: the pipeline would otherwise encode an empty prompt, which
    the model was not trained with. SD3Transformer2DModel has no mask: it equals our MMDiT for captions without padding,
    and guidance in StableDiffusion3Pipeline, whose null caption is as long as the prompt, is not quite ours.

    Args:
        weights: state dict of our model; a REPA head is left out.
        multiplier: `Readout.multiplier` of the model.
        allow_timestep_mismatch: write a DiT that needs `use_published_timesteps` after each loading.

    Raises:
        ValueError: diffusers has no class or pipeline for the model, or the tensors are not those of the model.
    """
    config = recipe.model
    known, pipeline = format_of(config), _pipeline(recipe)
    if known.check is not None:
        known.check(config, weights, allow_timestep_mismatch)
    transformer, scheduler = peer(config), pipeline.scheduler()
    readout = f"{models.family_of(config).readout}.weight"
    folded = {**weights, readout: weights[readout] * multiplier}
    fixed = {name: value for name, value in transformer.state_dict().items() if name in THEIR_BUFFERS}
    load_strictly(transformer, fixed | to_diffusers(config, folded), "the state dict")
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    write_text(folder / "model_index.json", json.dumps(_index(pipeline, transformer, scheduler), indent=2) + "\n")
    for name, tensors in (known.files(weights) if known.files else {}).items():
        save_file(tensors, folder / name)


def _pipeline(recipe: Recipe) -> Pipeline:
    """The pipeline that fits model and objective."""
    kind, pipelines = recipe.objective.kind, format_of(recipe.model).pipelines
    if kind not in pipelines:
        raise ValueError(f"diffusers has no pipeline for a {recipe.model.family} model trained with objective {kind}")
    return pipelines[kind]


def _index(pipeline: Pipeline, transformer: nn.Module, scheduler: Any) -> dict[str, Any]:
    return {
        "_class_name": pipeline.name,
        "transformer": ["diffusers", type(transformer).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
        **{name: list(component) for name, component in pipeline.others.items()},
    }
