"""Our tensors under the names and in the layouts of diffusers, and back, for every family of models.

A correspondence is a list of `Pair`s, one per tensor of ours. What each model computes is the same on both sides; the
layouts differ in how projections are fused and in the order of features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from megadit.interop.strict import name_problems
from megadit.recipe import DiTModel, MMDiTModel, ModelConfig, PixArtModel

# What diffusers computes itself or has no place for: fixed tables and the REPA head.
NOT_IN_DIFFUSERS = ("pos_embed", "y_embedder.y_embedding", "repa_head.")


@dataclass(frozen=True)
class Pair:
    """One tensor of ours, and the tensors of diffusers that hold its content."""

    ours: str
    theirs: tuple[str, ...]
    to_theirs: Callable[[Tensor], Sequence[Tensor]]
    to_ours: Callable[[Sequence[Tensor]], Tensor]


def to_diffusers(config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict (or gradients) as diffusers has it; fixed tables and the REPA head are left out.

    Raises ValueError for tensors that are missing or that a model of this family does not have.
    """
    pairs = pairs_of(config)
    _require({name for name in ours if not name.startswith(NOT_IN_DIFFUSERS)}, {pair.ours for pair in pairs})
    theirs: dict[str, Tensor] = {}
    for pair in pairs:
        theirs |= zip(pair.theirs, pair.to_theirs(ours[pair.ours]), strict=True)
    return theirs


def from_diffusers(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of our model from a state dict of diffusers; `to_diffusers` is the inverse.

    Raises ValueError for tensors that are missing or that the class of diffusers does not have, and for a DiT whose
    blocks do not share one timestep and label embedding.
    """
    pairs = pairs_of(config)
    _require(theirs.keys() - {"pos_embed.pos_embed"}, {name for pair in pairs for name in pair.theirs})
    return {pair.ours: pair.to_ours([theirs[name] for name in pair.theirs]) for pair in pairs}


def pairs_of(config: ModelConfig) -> list[Pair]:
    """The correspondence for a model."""
    if isinstance(config, DiTModel):
        return list(_dit(config))
    if isinstance(config, PixArtModel):
        return list(_pixart(config))
    return list(_mmdit(config))


def _dit(config: DiTModel) -> Iterator[Pair]:
    blocks = [f"transformer_blocks.{index}" for index in range(config.depth)]
    embedders = [f"{block}.norm1.emb" for block in blocks]  # diffusers keeps a copy in every block
    yield from _linear("x_embedder.proj", "pos_embed.proj")
    for ours, theirs in (("mlp.0", "linear_1"), ("mlp.2", "linear_2")):
        for leaf in ("weight", "bias"):
            copies = [f"{embedder}.timestep_embedder.{theirs}.{leaf}" for embedder in embedders]
            yield Pair(f"t_embedder.{ours}.{leaf}", tuple(copies), _copy_to(len(copies)), _the_same)
    copies = [f"{embedder}.class_embedder.embedding_table.weight" for embedder in embedders]
    yield Pair("y_embedder.embedding_table.weight", tuple(copies), _copy_to(len(copies)), _the_same)
    for index, block in enumerate(blocks):
        yield from _attention_and_mlp(f"blocks.{index}", block)
        yield from _linear(f"blocks.{index}.adaLN_modulation.1", f"{block}.norm1.linear")
    yield from _linear("final_layer.adaLN_modulation.1", "proj_out_1")
    yield from _linear("final_layer.linear", "proj_out_2")


def _pixart(config: PixArtModel) -> Iterator[Pair]:
    yield from _linear("x_embedder.proj", "pos_embed.proj")
    for ours, theirs in (("mlp.0", "linear_1"), ("mlp.2", "linear_2")):
        yield from _linear(f"t_embedder.{ours}", f"adaln_single.emb.timestep_embedder.{theirs}")
    yield from _linear("t_block.1", "adaln_single.linear")
    yield from _linear("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    yield from _linear("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    for index in range(config.depth):
        ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        yield _same(f"{ours}.scale_shift_table", f"{theirs}.scale_shift_table")
        yield from _attention_and_mlp(ours, theirs)
        yield from _linear(f"{ours}.cross_attn.q_linear", f"{theirs}.attn2.to_q")
        yield from _split(f"{ours}.cross_attn.kv_linear", [f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v"])
        yield from _linear(f"{ours}.cross_attn.proj", f"{theirs}.attn2.to_out.0")
    yield _same("final_layer.scale_shift_table", "scale_shift_table")
    yield from _linear("final_layer.linear", "proj_out")


def _mmdit(config: MMDiTModel) -> Iterator[Pair]:
    patch = (config.in_channels, config.patch_size, config.patch_size)
    yield Pair(
        "patch_embed.weight",
        ("pos_embed.proj.weight",),
        lambda weight: [weight.unflatten(1, patch)],
        lambda weights: weights[0].flatten(1),
    )
    yield _same("patch_embed.bias", "pos_embed.proj.bias")
    yield from _linear("text_embed", "context_embedder")
    for ours, theirs in (("time_embed", "timestep_embedder"), ("pooled_embed", "text_embedder")):
        yield from _linear(f"{ours}.fc1", f"time_text_embed.{theirs}.linear_1")
        yield from _linear(f"{ours}.fc2", f"time_text_embed.{theirs}.linear_2")
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
    yield from _linear(f"{ours}.image.modulation", f"{theirs}.norm1.linear")
    # Where the text stream ends, diffusers has the continuous norm, with the scale before the shift.
    text_modulation = _swapped if is_last else _linear
    yield from text_modulation(f"{ours}.text.modulation", f"{theirs}.norm1_context.linear")
    yield from _split(f"{ours}.image.qkv", [f"{theirs}.attn.to_{part}" for part in "qkv"])
    yield from _split(f"{ours}.text.qkv", [f"{theirs}.attn.add_{part}_proj" for part in "qkv"])
    for part in "qk":
        yield _same(f"{ours}.qk_norm.image_{part}", f"{theirs}.attn.norm_{part}.weight")
        yield _same(f"{ours}.qk_norm.text_{part}", f"{theirs}.attn.norm_added_{part}.weight")
    streams = [("image", "attn.to_out.0", "ff")] + ([] if is_last else [("text", "attn.to_add_out", "ff_context")])
    for stream, out, mlp in streams:
        yield from _linear(f"{ours}.{stream}.proj", f"{theirs}.{out}")
        yield from _linear(f"{ours}.{stream}.mlp.fc1", f"{theirs}.{mlp}.net.0.proj")
        yield from _linear(f"{ours}.{stream}.mlp.fc2", f"{theirs}.{mlp}.net.2")


def _attention_and_mlp(ours: str, theirs: str) -> Iterator[Pair]:
    """What the blocks of DiT and PixArt have in common."""
    yield from _split(f"{ours}.attn.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"])
    yield from _linear(f"{ours}.attn.proj", f"{theirs}.attn1.to_out.0")
    yield from _linear(f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj")
    yield from _linear(f"{ours}.mlp.fc2", f"{theirs}.ff.net.2")


def _same(ours: str, theirs: str) -> Pair:
    return Pair(ours, (theirs,), _copy_to(1), _the_same)


def _linear(ours: str, theirs: str) -> Iterator[Pair]:
    for leaf in ("weight", "bias"):
        yield _same(f"{ours}.{leaf}", f"{theirs}.{leaf}")


def _split(ours: str, theirs: Sequence[str]) -> Iterator[Pair]:
    """One projection of ours that diffusers has in parts."""
    for leaf in ("weight", "bias"):
        parts = tuple(f"{part}.{leaf}" for part in theirs)
        yield Pair(f"{ours}.{leaf}", parts, lambda tensor: tensor.chunk(len(theirs)), lambda parts: torch.cat([*parts]))


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


def _copy_to(count: int) -> Callable[[Tensor], Sequence[Tensor]]:
    return lambda tensor: [tensor] * count


def _the_same(copies: Sequence[Tensor]) -> Tensor:
    if not all(torch.equal(copies[0], copy) for copy in copies[1:]):
        raise ValueError("the blocks have different timestep or label embeddings; our DiT has one for all")
    return copies[0]


def _require(found: Set[str], expected: Set[str]) -> None:
    if problems := name_problems(found, expected):
        raise ValueError(f"the weights are not those of the model: of its tensors, {'; '.join(problems)}")
