"""PixArt-alpha as diffusers has it: PixArtTransformer2DModel and PixArtAlphaPipeline."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from torch import Tensor

from megadit.batch import Batch
from megadit.models.diffusers_format import (
    VAE,
    DiffusersFormat,
    Pair,
    Pipeline,
    attention_and_mlp,
    linear,
    require_positions,
    same,
    split,
)
from megadit.models.layers import NORM_EPS, fixed_positions
from megadit.models.pixart.config import PixArtConfig


def peer(config: PixArtConfig, sizes: dict[str, Any]) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        **sizes,
        cross_attention_dim=config.width,
        caption_channels=config.text_dim,
        norm_eps=NORM_EPS,
        interpolation_scale=1,
        use_additional_conditions=False,
    )


def pairs(config: PixArtConfig) -> Iterator[Pair]:
    yield from linear("x_embedder.proj", "pos_embed.proj")
    for ours, theirs in (("mlp.0", "linear_1"), ("mlp.2", "linear_2")):
        yield from linear(f"t_embedder.{ours}", f"adaln_single.emb.timestep_embedder.{theirs}")
    yield from linear("t_block.1", "adaln_single.linear")
    yield from linear("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    yield from linear("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    for index in range(config.depth):
        ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        yield same(f"{ours}.scale_shift_table", f"{theirs}.scale_shift_table")
        yield from attention_and_mlp(ours, theirs)
        yield from linear(f"{ours}.cross_attn.q_linear", f"{theirs}.attn2.to_q")
        yield from split(f"{ours}.cross_attn.kv_linear", [f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v"])
        yield from linear(f"{ours}.cross_attn.proj", f"{theirs}.attn2.to_out.0")
    yield same("final_layer.scale_shift_table", "scale_shift_table")
    yield from linear("final_layer.linear", "proj_out")


def _arguments(batch: Batch) -> dict[str, Any]:
    mask = torch.arange(batch.text.shape[1], device=batch.text.device) < batch.text_lengths[:, None]
    size = {"resolution": None, "aspect_ratio": None}
    return {"encoder_hidden_states": batch.text, "encoder_attention_mask": mask, "added_cond_kwargs": size}


def _check(config: PixArtConfig, weights: Mapping[str, Tensor], allow_mismatch: bool) -> None:
    require_positions(weights, fixed_positions(config))


def _null_caption(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The null caption as `negative_prompt_embeds`: the pipeline would otherwise encode an empty prompt."""
    embeds = weights["y_embedder.y_embedding"][None].contiguous()
    return {"null_caption.safetensors": {"negative_prompt_embeds": embeds}}


FORMAT = DiffusersFormat(
    peer=peer,
    pairs=pairs,
    pipelines={
        "ddpm": Pipeline(
            "PixArtAlphaPipeline",
            lambda: DPMSolverMultistepScheduler(beta_schedule="linear"),
            others={
                **VAE,
                "text_encoder": ("transformers", "T5EncoderModel"),
                "tokenizer": ("transformers", "T5Tokenizer"),
            },
        )
    },
    arguments=_arguments,
    left_out=("pos_embed", "y_embedder.y_embedding"),
    check=_check,
    files=_null_caption,
)
