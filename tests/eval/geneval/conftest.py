"""Tiny networks for GenEval: a checkpoint as mmdetection writes it, described here from its modules, and a CLIP."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

Shapes = dict[str, tuple[int, ...]]
MmdetShapes = Callable[..., Shapes]
NUM_CLASSES = 80


def _mmdet_shapes(
    version: int = 2,
    embed_dim: int = 8,
    depths: tuple[int, ...] = (1, 1, 2, 1),
    heads: tuple[int, ...] = (1, 2, 2, 4),
    window: int = 7,
    width: int = 32,
    pixel_layers: int = 1,
    pixel_hidden: int = 16,
    query_layers: int = 2,
    query_hidden: int = 24,
    queries: int = 6,
    attention_heads: int = 4,
) -> Shapes:
    """Names and shapes of the state dict of mmdetection's Mask2Former, version 2 or 3."""
    shapes: Shapes = {}

    def linear(name: str, num_out: int, num_in: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (num_out, num_in), (num_out,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (size,), (size,)

    shapes["backbone.patch_embed.projection.weight"] = (embed_dim, 3, 4, 4)
    shapes["backbone.patch_embed.projection.bias"] = (embed_dim,)
    norm("backbone.patch_embed.norm", embed_dim)
    dims = [embed_dim * 2**stage for stage in range(len(depths))]
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        for block in range(depth):
            prefix = f"backbone.stages.{stage}.blocks.{block}"
            norm(f"{prefix}.norm1", dim)
            shapes[f"{prefix}.attn.w_msa.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[stage])
            shapes[f"{prefix}.attn.w_msa.relative_position_index"] = (window**2, window**2)
            linear(f"{prefix}.attn.w_msa.qkv", 3 * dim, dim)
            linear(f"{prefix}.attn.w_msa.proj", dim, dim)
            norm(f"{prefix}.norm2", dim)
            linear(f"{prefix}.ffn.layers.0.0", 4 * dim, dim)
            linear(f"{prefix}.ffn.layers.1", dim, 4 * dim)
        if stage < len(depths) - 1:
            norm(f"backbone.stages.{stage}.downsample.norm", 4 * dim)
            shapes[f"backbone.stages.{stage}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
        norm(f"backbone.norm{stage}", dim)

    pixels = "panoptic_head.pixel_decoder"
    for level, dim in enumerate(reversed(dims[1:])):
        shapes[f"{pixels}.input_convs.{level}.conv.weight"] = (width, dim, 1, 1)
        shapes[f"{pixels}.input_convs.{level}.conv.bias"] = (width,)
        norm(f"{pixels}.input_convs.{level}.gn", width)
    attention, cross, own, ffn = {
        2: ("attentions.0", "attentions.0", "attentions.1", "ffns.0"),
        3: ("self_attn", "cross_attn", "self_attn", "ffn"),
    }[version]
    for layer in range(pixel_layers):
        prefix = f"{pixels}.encoder.layers.{layer}"
        linear(f"{prefix}.{attention}.sampling_offsets", attention_heads * 3 * 4 * 2, width)
        linear(f"{prefix}.{attention}.attention_weights", attention_heads * 3 * 4, width)
        linear(f"{prefix}.{attention}.value_proj", width, width)
        linear(f"{prefix}.{attention}.output_proj", width, width)
        linear(f"{prefix}.{ffn}.layers.0.0", pixel_hidden, width)
        linear(f"{prefix}.{ffn}.layers.1", width, pixel_hidden)
        norm(f"{prefix}.norms.0", width)
        norm(f"{prefix}.norms.1", width)
    shapes[f"{pixels}.level_encoding.weight"] = (3, width)
    shapes[f"{pixels}.lateral_convs.0.conv.weight"] = (width, embed_dim, 1, 1)
    norm(f"{pixels}.lateral_convs.0.gn", width)
    shapes[f"{pixels}.output_convs.0.conv.weight"] = (width, width, 3, 3)
    norm(f"{pixels}.output_convs.0.gn", width)
    shapes[f"{pixels}.mask_feature.weight"], shapes[f"{pixels}.mask_feature.bias"] = (width, width, 1, 1), (width,)

    for layer in range(query_layers):
        prefix = f"panoptic_head.transformer_decoder.layers.{layer}"
        for part in (cross, own):
            shapes[f"{prefix}.{part}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{prefix}.{part}.attn.in_proj_bias"] = (3 * width,)
            linear(f"{prefix}.{part}.attn.out_proj", width, width)
        linear(f"{prefix}.{ffn}.layers.0.0", query_hidden, width)
        linear(f"{prefix}.{ffn}.layers.1", width, query_hidden)
        for place in range(3):
            norm(f"{prefix}.norms.{place}", width)
    norm("panoptic_head.transformer_decoder.post_norm", width)
    shapes["panoptic_head.query_embed.weight"] = (queries, width)
    shapes["panoptic_head.query_feat.weight"] = (queries, width)
    shapes["panoptic_head.level_embed.weight"] = (3, width)
    linear("panoptic_head.cls_embed", NUM_CLASSES + 1, width)
    for place in (0, 2, 4):
        linear(f"panoptic_head.mask_embed.{place}", width, width)
    return shapes


@pytest.fixture(scope="session")
def mmdet_shapes() -> MmdetShapes:
    return _mmdet_shapes


@pytest.fixture(scope="session")
def mmdet_state() -> dict[str, Tensor]:
    """Random weights of a tiny detector under mmdet 2's names; it takes most of any picture for dogs and cats."""
    generator = torch.Generator().manual_seed(1)
    state = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in _mmdet_shapes().items()}
    norms = {name for name in state if any(part in name for part in (".norm", "_norm", ".gn.")) and "weight" in name}
    state |= {name: state[name] + 1 for name in norms}
    state["panoptic_head.cls_embed.bias"][[15, 16]] += torch.tensor([6.0, 7.0])  # cat and dog
    state["panoptic_head.mask_embed.4.weight"] *= 20  # sure of its masks
    return state


@pytest.fixture(scope="session")
def mmdet_file(mmdet_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file as mmdetection publishes them."""
    path = tmp_path_factory.mktemp("mmdet") / "mask2former.pth"
    torch.save({"meta": {"mmdet_version": "2.24.0", "CLASSES": ("person",)}, "state_dict": mmdet_state}, path)
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with OpenAI's activation and a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: place for place, token in enumerate(tokens)}, merges=[])
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(2)
    model = CLIPModel(
        CLIPConfig(
            text_config=tower
            | {"vocab_size": len(tokens), "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1},
            vision_config=tower | {"image_size": 16, "patch_size": 8},
            projection_dim=16,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():  # the initial weights are so small that all pictures look alike
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
