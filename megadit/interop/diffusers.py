"""Models as diffusers has them: the class of the same architecture, and folders that its pipelines load.

A folder that `export` writes has `transformer/`, `scheduler/` and a `model_index.json` without the components that are
not ours (autoencoder, text encoders); those are passed to the pipeline's `from_pretrained`.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    PixArtTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
)
from safetensors.torch import save_file
from torch import Tensor

from megadit.interop.layouts import to_diffusers
from megadit.interop.strict import load_strictly
from megadit.models.layers import NORM_EPS, fixed_positions
from megadit.recipe import DiTModel, MMDiTModel, ModelConfig, PixArtModel, Recipe

logger = logging.getLogger(__name__)

READOUTS = {"dit": "final_layer.linear", "pixart": "final_layer.linear", "mmdit": "readout"}


def peer(config: ModelConfig) -> ModelMixin:
    """The diffusers model of the same architecture and sizes, with random weights.

    Raises ValueError for a size that the class of diffusers cannot have. DiTTransformer2DModel has
    `timestep_freq_shift` 1 whatever the config says; `use_published_timesteps` changes that.
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
    if isinstance(config, DiTModel):
        return DiTTransformer2DModel(**sizes, num_embeds_ada_norm=config.num_classes, norm_eps=NORM_EPS)
    if isinstance(config, PixArtModel):
        return PixArtTransformer2DModel(
            **sizes,
            cross_attention_dim=config.width,
            caption_channels=config.text_dim,
            norm_eps=NORM_EPS,
            interpolation_scale=1,
            use_additional_conditions=False,
        )
    return SD3Transformer2DModel(
        **sizes,
        joint_attention_dim=config.text_dim,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_dim,
        pos_embed_max_size=config.input_size // config.patch_size,
        qk_norm="rms_norm",
    )


def use_published_timesteps(transformer: DiTTransformer2DModel) -> None:
    """Give a DiT of diffusers the timestep features of the published code (`timestep_freq_shift` 0).

    diffusers has no setting for it, so this has to be done each time such a model has been loaded.
    """
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0


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
    scheduler, pipeline = _scheduler_and_pipeline(recipe)
    if isinstance(config, DiTModel):
        _check_timesteps(config, allow_timestep_mismatch)
        if config.num_classes != 1000:
            logger.warning(
                "DiTPipeline guides by class 1000, which is the null class of a model with 1000 classes only"
            )
    _check_positions(config, weights)
    transformer = peer(config)
    readout = f"{READOUTS[config.family]}.weight"
    folded = {**weights, readout: weights[readout] * multiplier}
    fixed = {name: value for name, value in transformer.state_dict().items() if name == "pos_embed.pos_embed"}  # SD3's
    load_strictly(transformer, fixed | to_diffusers(config, folded), "the state dict")
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_index(pipeline, transformer, scheduler), indent=2) + "\n")
    if isinstance(config, PixArtModel):
        null_caption = weights["y_embedder.y_embedding"][None].contiguous()
        save_file({"negative_prompt_embeds": null_caption}, folder / "null_caption.safetensors")


def _scheduler_and_pipeline(recipe: Recipe) -> tuple[SchedulerMixin, str]:
    """The scheduler that fits the objective, and the pipeline that fits scheduler and model."""
    match recipe.model.family, recipe.objective.kind:
        case "dit", "ddpm":
            # DiTPipeline drops the learned variance before it calls the scheduler.
            return DDIMScheduler(beta_schedule="linear", clip_sample=False), "DiTPipeline"
        case "pixart", "ddpm":
            return DPMSolverMultistepScheduler(beta_schedule="linear"), "PixArtAlphaPipeline"
        case "mmdit", "flow":
            return FlowMatchEulerDiscreteScheduler(), "StableDiffusion3Pipeline"
        case family, kind:
            raise ValueError(f"diffusers has no pipeline for a {family} model trained with objective {kind}")


def _index(pipeline: str, transformer: ModelMixin, scheduler: SchedulerMixin) -> dict[str, Any]:
    others = {
        "DiTPipeline": {"vae": ["diffusers", "AutoencoderKL"]},
        "PixArtAlphaPipeline": {
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
        },
        "StableDiffusion3Pipeline": {
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_3": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "tokenizer_3": ["transformers", "T5TokenizerFast"],
        },
    }
    return {
        "_class_name": pipeline,
        "transformer": ["diffusers", type(transformer).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
        **others[pipeline],
    }


def _check_timesteps(config: DiTModel, allow_mismatch: bool) -> None:
    if config.timestep_freq_shift == 0 and not allow_mismatch:
        raise ValueError(
            "DiTTransformer2DModel of diffusers has other timestep frequencies (10000^(-i/127)) than the published DiT "
            "(10000^(-i/128)), and no setting for it; train with model.timestep_freq_shift: 1, or export with "
            "--allow-timestep-mismatch and set downscale_freq_shift = 0 on every block's norm1.emb.time_proj after "
            "loading (megadit.interop.diffusers.use_published_timesteps)"
        )


def _check_positions(config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """diffusers computes positions: weights that were trained with others would come out wrong."""
    if not isinstance(config, MMDiTModel):
        positions = fixed_positions(config)
        found = weights.get("pos_embed", positions)
        if found.shape != positions.shape or not torch.allclose(found, positions, atol=1e-5):
            raise ValueError("pos_embed is not the sine-cosine table of the recipe's model, which diffusers computes")
