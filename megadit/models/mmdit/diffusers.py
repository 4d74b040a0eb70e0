"""MMDiT as diffusers has it: SD3Transformer2DModel and StableDiffusion3Pipeline."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor

from megadit.models.diffusers_format import VAE, DiffusersFormat, Pair, Pipeline, linear, same, split
from megadit.models.mmdit.config import MMDiTConfig


def peer(config: MMDiTConfig, sizes: dict[str, Any]) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        **sizes,
        joint_attention_dim=config.text_dim,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_dim,
        pos_embed_max_size=config.input_size // config.patch_size,
        qk_norm="rms_norm",
    )


def pairs(config: MMDiTConfig) -> Iterator[Pair]:
    patch = (config.in_channels, config.patch_size, config.patch_size)
    yield Pair(
        "patch_embed.weight",
        ("pos_embed.proj.weight",),
        lambda weight: [weight.unflatten(1, patch)],
        lambda weights: weights[0].flatten(1),
    )
    yield same("patch_embed.bias", "pos_embed.proj.bias")
    yield from linear("text_embed", "context_embedder")
    for ours, theirs in (("time_embed", "timestep_embedder"), ("pooled_embed", "text_embedder")):
        yield from linear(f"{ours}.fc1", f"time_text_embed.{theirs}.linear_1")
        yield from linear(f"{ours}.fc2", f"time_text_embed.{theirs}.linear_2")
    for index in range(config.depth):
        yield from _joint_block(f"blocks.{index}", f"transformer_blocks.{index}", is_last=index == config.depth - 1)
    yield from _swapped("final_modulation", "norm_out.linear")
    for leaf in ("weight", "bias"):  # our features are ordered (channel, row, column), theirs (row, column, channel)
        yield Pair(
            f"readout.{leaf}",
            (f"proj_out.{leaf}",),
            lambda tensor: [tensor.unflatten(0, patch).movedim(0, 2).flatten(0, 2)],
            lambda tensors: tensors[0].unflatten(0, (*patch[1:], patch[0])).movedim(2, 0).flatten(0, 2),
        )


def _joint_block(ours: str, theirs: str, *, is_last: bool) -> Iterator[Pair]:
    yield from linear(f"{ours}.image.modulation", f"{theirs}.norm1.linear")
    # Where the text stream ends, diffusers has the continuous norm, with the scale before the shift.
    text_modulation = _swapped if is_last else linear
    yield from text_modulation(f"{ours}.text.modulation", f"{theirs}.norm1_context.linear")
    yield from split(f"{ours}.image.qkv", [f"{theirs}.attn.to_{part}" for part in "qkv"])
    yield from split(f"{ours}.text.qkv", [f"{theirs}.attn.add_{part}_proj" for part in "qkv"])
    for part in "qk":
        yield same(f"{ours}.qk_norm.image_{part}", f"{theirs}.attn.norm_{part}.weight")
        yield same(f"{ours}.qk_norm.text_{part}", f"{theirs}.attn.norm_added_{part}.weight")
    streams = [("image", "attn.to_out.0", "ff")] + ([] if is_last else [("text", "attn.to_add_out", "ff_context")])
    for stream, out, mlp in streams:
        yield from linear(f"{ours}.{stream}.proj", f"{theirs}.{out}")
        yield from linear(f"{ours}.{stream}.mlp.fc1", f"{theirs}.{mlp}.net.0.proj")
        yield from linear(f"{ours}.{stream}.mlp.fc2", f"{theirs}.{mlp}.net.2")


def _swapped(ours: str, theirs: str) -> Iterator[Pair]:
    """A modulation that gives shift and scale here, scale and shift there."""
    for leaf in ("weight", "bias"):
        yield Pair(
            f"{ours}.{leaf}",
            (f"{theirs}.{leaf}",),
            lambda tensor: [_swap_halves(tensor)],
            lambda tensors: _swap_halves(tensors[0]),
        )


def _swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


_OTHERS = {
    **VAE,
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
}
FORMAT = DiffusersFormat(
    peer=peer,
    pairs=pairs,
    pipelines={"flow": Pipeline("StableDiffusion3Pipeline", FlowMatchEulerDiscreteScheduler, _OTHERS)},
    arguments=lambda batch: {"encoder_hidden_states": batch.text, "pooled_projections": batch.pooled},
    left_out=("repa_head.",),
)
