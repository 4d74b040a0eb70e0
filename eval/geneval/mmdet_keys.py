"""The published Mask2Former checkpoints of mmdetection under the names of Hugging Face's published ones.

The detector of GenEval is mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco of mmdet 2; mmdet 3 has the same weights under
other names. Both become the state dict of a file such as facebook/mask2former-swin-small-coco-instance, which
every release of transformers reads. The models are the same up to names, to three attention layouts and to the order
of channels in Swin's patch merging.
"""

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import Mask2FormerConfig, SwinConfig

SWIN, PIXELS, QUERIES = (
    "model.pixel_level_module.encoder",
    "model.pixel_level_module.decoder",
    "model.transformer_module",
)
SWIN_BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)"
PIXEL_LAYER = r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)"
QUERY_LAYER = r"panoptic_head\.transformer_decoder\.layers\.(\d+)"
BOTH = r"(weight|bias)"

# A name of mmdet (2 or 3) in full, and the name in transformers' files.
RENAMED = {
    rf"backbone\.patch_embed\.projection\.{BOTH}": rf"{SWIN}.embeddings.patch_embeddings.projection.\1",
    rf"backbone\.patch_embed\.norm\.{BOTH}": rf"{SWIN}.embeddings.norm.\1",
    rf"{SWIN_BLOCK}\.norm1\.{BOTH}": rf"{SWIN}.encoder.layers.\1.blocks.\2.layernorm_before.\3",
    rf"{SWIN_BLOCK}\.norm2\.{BOTH}": rf"{SWIN}.encoder.layers.\1.blocks.\2.layernorm_after.\3",
    rf"{SWIN_BLOCK}\.attn\.w_msa\.relative_position_bias_table": (
        rf"{SWIN}.encoder.layers.\1.blocks.\2.attention.self.relative_position_bias_table"
    ),
    rf"{SWIN_BLOCK}\.attn\.w_msa\.proj\.{BOTH}": rf"{SWIN}.encoder.layers.\1.blocks.\2.attention.output.dense.\3",
    rf"{SWIN_BLOCK}\.ffn\.layers\.0\.0\.{BOTH}": rf"{SWIN}.encoder.layers.\1.blocks.\2.intermediate.dense.\3",
    rf"{SWIN_BLOCK}\.ffn\.layers\.1\.{BOTH}": rf"{SWIN}.encoder.layers.\1.blocks.\2.output.dense.\3",
    rf"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv\.{BOTH}": rf"{PIXELS}.input_projections.\1.0.\2",
    rf"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn\.{BOTH}": rf"{PIXELS}.input_projections.\1.1.\2",
    r"panoptic_head\.pixel_decoder\.level_encoding\.weight": rf"{PIXELS}.level_embed",
    rf"{PIXEL_LAYER}\.(?:attentions\.0|self_attn)\.(\w+)\.{BOTH}": rf"{PIXELS}.encoder.layers.\1.self_attn.\2.\3",
    rf"{PIXEL_LAYER}\.(?:ffns\.0|ffn)\.layers\.0\.0\.{BOTH}": rf"{PIXELS}.encoder.layers.\1.fc1.\2",
    rf"{PIXEL_LAYER}\.(?:ffns\.0|ffn)\.layers\.1\.{BOTH}": rf"{PIXELS}.encoder.layers.\1.fc2.\2",
    rf"{PIXEL_LAYER}\.norms\.0\.{BOTH}": rf"{PIXELS}.encoder.layers.\1.self_attn_layer_norm.\2",
    rf"{PIXEL_LAYER}\.norms\.1\.{BOTH}": rf"{PIXELS}.encoder.layers.\1.final_layer_norm.\2",
    r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.weight": rf"{PIXELS}.adapter_1.0.weight",
    rf"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.{BOTH}": rf"{PIXELS}.adapter_1.1.\1",
    r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.weight": rf"{PIXELS}.layer_1.0.weight",
    rf"panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.{BOTH}": rf"{PIXELS}.layer_1.1.\1",
    rf"panoptic_head\.pixel_decoder\.mask_feature\.{BOTH}": rf"{PIXELS}.mask_projection.\1",
    # mmdet 2 numbers the attentions of a layer in the order of use: cross-attention first.
    rf"{QUERY_LAYER}\.(?:attentions\.0|cross_attn)\.attn\.(in_proj_|out_proj\.){BOTH}": (
        rf"{QUERIES}.decoder.layers.\1.cross_attn.\2\3"
    ),
    rf"{QUERY_LAYER}\.(?:attentions\.1|self_attn)\.attn\.out_proj\.{BOTH}": (
        rf"{QUERIES}.decoder.layers.\1.self_attn.out_proj.\2"
    ),
    rf"{QUERY_LAYER}\.(?:ffns\.0|ffn)\.layers\.0\.0\.{BOTH}": rf"{QUERIES}.decoder.layers.\1.fc1.\2",
    rf"{QUERY_LAYER}\.(?:ffns\.0|ffn)\.layers\.1\.{BOTH}": rf"{QUERIES}.decoder.layers.\1.fc2.\2",
    rf"{QUERY_LAYER}\.norms\.0\.{BOTH}": rf"{QUERIES}.decoder.layers.\1.cross_attn_layer_norm.\2",
    rf"{QUERY_LAYER}\.norms\.1\.{BOTH}": rf"{QUERIES}.decoder.layers.\1.self_attn_layer_norm.\2",
    rf"{QUERY_LAYER}\.norms\.2\.{BOTH}": rf"{QUERIES}.decoder.layers.\1.final_layer_norm.\2",
    rf"panoptic_head\.transformer_decoder\.post_norm\.{BOTH}": rf"{QUERIES}.decoder.layernorm.\1",
    r"panoptic_head\.query_embed\.weight": f"{QUERIES}.queries_embedder.weight",
    r"panoptic_head\.query_feat\.weight": f"{QUERIES}.queries_features.weight",
    r"panoptic_head\.level_embed\.weight": f"{QUERIES}.level_embed.weight",
    rf"panoptic_head\.cls_embed\.{BOTH}": r"class_predictor.\1",
}
SWIN_QKV = re.compile(rf"{SWIN_BLOCK}\.attn\.w_msa\.qkv\.{BOTH}")
QUERY_QKV = re.compile(rf"{QUERY_LAYER}\.(?:attentions\.1|self_attn)\.attn\.in_proj_{BOTH}")
MERGING = re.compile(r"backbone\.stages\.(\d+)\.downsample\.(norm|reduction)\.(weight|bias)")
STAGE_NORM = re.compile(rf"backbone\.norm(\d)\.{BOTH}")
MASK_EMBED = re.compile(rf"panoptic_head\.mask_embed\.([024])\.{BOTH}")
TABLES = re.compile(rf"{SWIN_BLOCK}\.attn\.w_msa\.relative_position_index")  # computed, not learned


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an mmdet 2 or 3 checkpoint, with the names and layouts of a file of transformers.

    Raises ValueError for a name that Mask2Former with a Swin backbone does not have.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not TABLES.fullmatch(name):
            converted |= _convert(name, tensor)
    return converted


def _convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
    for pattern, replacement in RENAMED.items():
        if match := re.fullmatch(pattern, name):
            return {match.expand(replacement): tensor}
    if match := SWIN_QKV.fullmatch(name):
        stage, block, kind = match.groups()
        prefix = f"{SWIN}.encoder.layers.{stage}.blocks.{block}.attention.self"
        return _split(tensor, [f"{prefix}.{part}.{kind}" for part in ("query", "key", "value")])
    if match := QUERY_QKV.fullmatch(name):
        prefix = f"{QUERIES}.decoder.layers.{match[1]}.self_attn"
        return _split(tensor, [f"{prefix}.{part}_proj.{match[2]}" for part in "qkv"])
    if match := MERGING.fullmatch(name):
        return {f"{SWIN}.encoder.layers.{match[1]}.downsample.{match[2]}.{match[3]}": _merging_order(tensor)}
    if match := STAGE_NORM.fullmatch(name):
        return {f"{SWIN}.hidden_states_norms.stage{int(match[1]) + 1}.{match[2]}": tensor}
    if match := MASK_EMBED.fullmatch(name):
        return {f"{QUERIES}.decoder.mask_predictor.mask_embedder.{int(match[1]) // 2}.0.{match[2]}": tensor}
    raise ValueError(f"{name} is not a tensor of mmdetection's Mask2Former with a Swin backbone")


def _split(tensor: Tensor, names: list[str]) -> dict[str, Tensor]:
    return dict(zip(names, tensor.chunk(len(names)), strict=True))


def _merging_order(tensor: Tensor) -> Tensor:
    """Reorder the 4 C inputs of a patch merging, the last dimension.

    mmdet gathers 2x2 patches by nn.Unfold: channel c of the patch (row, column) is input 4 c + 2 row + column.
    transformers concatenates the patches (0, 0), (1, 0), (0, 1), (1, 1): input C (row + 2 column) + c.
    """
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)


def config_of(converted: Mapping[str, Tensor]) -> Mask2FormerConfig:
    """The sizes of a converted checkpoint. Raises ValueError when a tensor that tells one is missing."""
    try:
        return _config_of(converted)
    except KeyError as error:
        raise ValueError(f"a Mask2Former checkpoint has a tensor {error.args[0]}, and this one does not") from None


def _config_of(converted: Mapping[str, Tensor]) -> Mask2FormerConfig:
    def count(prefix: str) -> int:
        places = [name.removeprefix(prefix).split(".")[0] for name in converted if name.startswith(prefix)]
        return len(set(places))

    def width(name: str, dimension: int = 0) -> int:
        return converted[name].shape[dimension]

    num_stages = count(f"{SWIN}.encoder.layers.")
    blocks = [f"{SWIN}.encoder.layers.{stage}.blocks." for stage in range(num_stages)]
    tables = [converted[f"{prefix}0.attention.self.relative_position_bias_table"] for prefix in blocks]
    embed_dim = width(f"{SWIN}.embeddings.patch_embeddings.projection.weight")
    swin = SwinConfig(
        embed_dim=embed_dim,
        depths=[count(prefix) for prefix in blocks],
        num_heads=[table.shape[1] for table in tables],
        window_size=(round(tables[0].shape[0] ** 0.5) + 1) // 2,  # a table has (2 window - 1)^2 rows
        mlp_ratio=width(f"{blocks[0]}0.intermediate.dense.weight") / embed_dim,
        out_features=[f"stage{stage + 1}" for stage in range(num_stages)],
    )
    attention = f"{PIXELS}.encoder.layers.0.self_attn"
    num_levels, num_points = width(f"{PIXELS}.level_embed"), 4  # mmdet's and transformers' constant
    return Mask2FormerConfig(
        backbone_config=swin,
        feature_size=width(f"{PIXELS}.level_embed", 1),
        mask_feature_size=width(f"{PIXELS}.mask_projection.weight"),
        hidden_dim=width(f"{QUERIES}.queries_features.weight", 1),
        num_queries=width(f"{QUERIES}.queries_features.weight"),
        num_attention_heads=width(f"{attention}.attention_weights.bias") // (num_levels * num_points),
        encoder_layers=count(f"{PIXELS}.encoder.layers."),
        encoder_feedforward_dim=width(f"{PIXELS}.encoder.layers.0.fc1.weight"),
        decoder_layers=count(f"{QUERIES}.decoder.layers.") + 1,  # transformers counts the prediction before the first
        dim_feedforward=width(f"{QUERIES}.decoder.layers.0.fc1.weight"),
        num_labels=width("class_predictor.weight") - 1,
    )
