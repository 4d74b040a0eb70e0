"""How a family's models look in diffusers: the class, the names and layouts of its tensors, the pipelines.

A correspondence is a list of `Pair`s, one per tensor of ours. What each model computes is the same on both sides; the
layouts differ in how projections are fused and in the order of features. This module does not import diffusers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megadit.batch import Batch


@dataclass(frozen=True)
class Pair:
    """One tensor of ours, and the tensors of diffusers that hold its content."""

    ours: str
    theirs: tuple[str, ...]
    to_theirs: Callable[[Tensor], Sequence[Tensor]]
    to_ours: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of diffusers that samples from the model as an objective trained it."""

    name: str
    scheduler: Callable[[], Any]
    others: Mapping[str, tuple[str, str]]  # components that are not ours: (library, class)


@dataclass(frozen=True)
class DiffusersFormat:
    """All that interop knows of a family. Functions get a config of the family."""

    peer: Callable[[Any, dict[str, Any]], nn.Module]  # the class, with random weights; the dict has the common sizes
    pairs: Callable[[Any], Iterable[Pair]]
    pipelines: Mapping[str, Pipeline]  # by the objective's kind
    arguments: Callable[[Batch], dict[str, Any]]  # what the class is called with beside pictures and timesteps
    left_out: tuple[str, ...] = ()  # beginnings of our names that diffusers computes itself or has no place for
    # Raises ValueError for (config, state dict, mismatch allowed) that the class would compute other things with.
    check: Callable[[Any, Mapping[str, Tensor], bool], None] | None = None
    files: Callable[[Mapping[str, Tensor]], dict[str, dict[str, Tensor]]] | None = None  # more to write, by file name


VAE = {"vae": ("diffusers", "AutoencoderKL")}


def same(ours: str, theirs: str) -> Pair:
    return Pair(ours, (theirs,), copy_to(1), the_same)


def linear(ours: str, theirs: str) -> Iterator[Pair]:
    for leaf in ("weight", "bias"):
        yield same(f"{ours}.{leaf}", f"{theirs}.{leaf}")


def split(ours: str, theirs: Sequence[str]) -> Iterator[Pair]:
    """One projection of ours that diffusers has in parts."""
    for leaf in ("weight", "bias"):
        parts = tuple(f"{part}.{leaf}" for part in theirs)
        yield Pair(f"{ours}.{leaf}", parts, lambda tensor: tensor.chunk(len(theirs)), lambda parts: torch.cat([*parts]))


def attention_and_mlp(ours: str, theirs: str) -> Iterator[Pair]:
    """What the blocks of DiT and PixArt have in common."""
    yield from split(f"{ours}.attn.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"])
    yield from linear(f"{ours}.attn.proj", f"{theirs}.attn1.to_out.0")
    yield from linear(f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj")
    yield from linear(f"{ours}.mlp.fc2", f"{theirs}.ff.net.2")


def copy_to(count: int) -> Callable[[Tensor], Sequence[Tensor]]:
    return lambda tensor: [tensor] * count


def the_same(copies: Sequence[Tensor]) -> Tensor:
    if not all(torch.equal(copies[0], copy) for copy in copies[1:]):
        raise ValueError("the blocks have different timestep or label embeddings; our DiT has one for all")
    return copies[0]


def require_positions(weights: Mapping[str, Tensor], positions: Tensor) -> None:
    """diffusers computes positions: weights that were trained with others would come out wrong."""
    found = weights.get("pos_embed", positions)
    if found.shape != positions.shape or not torch.allclose(found, positions, atol=1e-5):
        raise ValueError("pos_embed is not the sine-cosine table of the recipe's model, which diffusers computes")
