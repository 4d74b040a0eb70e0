"""The published checkpoint's tensors in transformers' model: all there, and computing what mmdetection computes.

mmdetection's layers are written down here from its modules, in plain torch.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megadit.eval.geneval.detector import Detector
from megadit.eval.geneval.mmdet_keys import config_of, to_transformers

CPU = torch.device("cpu")
SWIN_SMALL = {
    "embed_dim": 96,
    "depths": (2, 2, 18, 2),
    "heads": (3, 6, 12, 24),
    "width": 256,
    "pixel_layers": 6,
    "pixel_hidden": 1024,
    "query_layers": 9,
    "query_hidden": 2048,
    "queries": 100,
    "attention_heads": 8,
}


@pytest.fixture(scope="module")
def detector(mmdet_file: Path) -> Detector:
    return Detector.load(mmdet_file, CPU)


@pytest.mark.parametrize("version", [2, 3])
def test_the_published_architecture_has_757_tensors_and_its_sizes_are_read_off(
    mmdet_shapes: Callable, version: int
) -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in mmdet_shapes(version, **SWIN_SMALL).items()}
    converted = to_transformers(state)
    assert len(converted) == 757
    config = config_of(converted)
    swin = config.backbone_config
    assert (swin.embed_dim, tuple(swin.depths), tuple(swin.num_heads)) == (96, (2, 2, 18, 2), (3, 6, 12, 24))
    assert (swin.window_size, swin.mlp_ratio, config.num_labels, config.num_queries) == (7, 4, 80, 100)
    assert (config.feature_size, config.mask_feature_size, config.hidden_dim) == (256, 256, 256)
    assert (config.encoder_layers, config.decoder_layers, config.num_attention_heads) == (6, 10, 8)
    assert (config.encoder_feedforward_dim, config.dim_feedforward) == (1024, 2048)


def test_every_tensor_of_the_model_comes_from_the_file(detector: Detector, mmdet_state: dict[str, Tensor]) -> None:
    """Each tensor's sum of squares turns up once: nothing is lost, doubled or left random."""

    def content(tensors: dict[str, Tensor]) -> list[float]:
        return sorted(float(tensor.double().square().sum()) for tensor in tensors.values())

    expected = to_transformers(mmdet_state)
    unused = ("relative_position_index", "swin.layernorm.", "criterion.empty_weight")
    loaded = {
        name: tensor for name, tensor in detector.model.state_dict().items() if not any(part in name for part in unused)
    }
    assert content(loaded) == content(expected)
    sizes = {name: tensor.numel() for name, tensor in mmdet_state.items() if not name.endswith("_index")}
    assert sum(tensor.numel() for tensor in loaded.values()) == sum(sizes.values())


def test_mmdet_3_names_give_the_same_weights(mmdet_state: dict[str, Tensor]) -> None:
    def rename(name: str) -> str:
        query_layer = "transformer_decoder" in name
        name = name.replace(".attentions.0.", ".cross_attn." if query_layer else ".self_attn.")
        return re.sub(r"\.ffns\.0\.", ".ffn.", name.replace(".attentions.1.", ".self_attn."))

    version_2 = to_transformers(mmdet_state)
    version_3 = to_transformers({rename(name): tensor for name, tensor in mmdet_state.items()})
    assert version_2.keys() == version_3.keys()
    assert all(torch.equal(version_2[name], version_3[name]) for name in version_2)


@torch.inference_mode()
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_patch_merging(detector: Detector, mmdet_state: dict[str, Tensor], stage: int) -> None:
    """mmdet: nn.Unfold, so channels come before places in the window."""
    prefix = f"backbone.stages.{stage}.downsample"
    dim = mmdet_state[f"{prefix}.norm.weight"].numel() // 4
    picture = torch.randn(2, dim, 6, 4)
    unfolded = nn.Unfold(kernel_size=2, stride=2)(picture).transpose(1, 2)
    normed = functional.layer_norm(
        unfolded, (4 * dim,), mmdet_state[f"{prefix}.norm.weight"], mmdet_state[f"{prefix}.norm.bias"]
    )
    expected = normed @ mmdet_state[f"{prefix}.reduction.weight"].T
    layer = detector.model.model.pixel_level_module.encoder.swin.encoder.layers[stage].downsample
    torch.testing.assert_close(layer(picture.flatten(2).transpose(1, 2), (6, 4)), expected)


@torch.inference_mode()
def test_window_attention(detector: Detector, mmdet_state: dict[str, Tensor]) -> None:
    """mmdet's WindowMSA: one projection for query, key and value, and a bias by the place relative to the key."""
    prefix, window, heads = "backbone.stages.1.blocks.0.attn.w_msa", 7, 2
    tokens = torch.randn(3, window * window, 16)
    qkv = functional.linear(tokens, mmdet_state[f"{prefix}.qkv.weight"], mmdet_state[f"{prefix}.qkv.bias"])
    query, key, value = qkv.unflatten(-1, (3, heads, 8)).permute(2, 0, 3, 1, 4)
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    below = rows.flatten()[:, None] - rows.flatten() + window - 1
    right = columns.flatten()[:, None] - columns.flatten() + window - 1
    bias = mmdet_state[f"{prefix}.relative_position_bias_table"][below * (2 * window - 1) + right].permute(2, 0, 1)
    weights = (query @ key.transpose(-2, -1) / 8**0.5 + bias).softmax(dim=-1)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    expected = functional.linear(mixed, mmdet_state[f"{prefix}.proj.weight"], mmdet_state[f"{prefix}.proj.bias"])
    layer = detector.model.model.pixel_level_module.encoder.swin.encoder.layers[1].blocks[0].attention
    torch.testing.assert_close(layer(tokens)[0], expected)


@torch.inference_mode()
@pytest.mark.parametrize(("place", "part"), [(0, "cross_attn"), (1, "self_attn")])
def test_query_attentions_are_torchs(detector: Detector, mmdet_state: dict[str, Tensor], place: int, part: str) -> None:
    """mmdet's operation order is cross_attn, norm, self_attn, norm: its first attention looks at the picture."""
    prefix = f"panoptic_head.transformer_decoder.layers.1.attentions.{place}.attn."
    reference = nn.MultiheadAttention(32, 4)
    own = {name.removeprefix(prefix): tensor for name, tensor in mmdet_state.items() if name.startswith(prefix)}
    reference.load_state_dict(own)
    queries = torch.randn(6, 1, 32)  # query, image, channel
    layer = getattr(detector.model.model.transformer_module.decoder.layers[1], part)
    if part == "self_attn":
        places = torch.randn(6, 1, 32)
        expected = reference(queries + places, queries + places, queries)[0]
        found = layer(hidden_states=queries, position_embeddings=places)[0]
    else:
        picture = torch.randn(20, 1, 32)
        expected, found = reference(queries, picture, picture)[0], layer(queries, picture, picture)[0]
    torch.testing.assert_close(found, expected)


def test_stage_norms_come_one_later(detector: Detector, mmdet_state: dict[str, Tensor]) -> None:
    norms = detector.model.model.pixel_level_module.encoder.hidden_states_norms
    for stage in range(4):
        assert torch.equal(norms[f"stage{stage + 1}"].weight, mmdet_state[f"backbone.norm{stage}.weight"])


def test_a_tensor_of_another_architecture_is_named(mmdet_state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^backbone\.layer1\.0\.conv1\.weight is not a tensor of mmdetection's"):
        to_transformers(mmdet_state | {"backbone.layer1.0.conv1.weight": torch.zeros(1)})
