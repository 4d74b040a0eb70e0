"""Our tensors under the names and in the layouts of diffusers, and back, as each family says."""

from collections.abc import Mapping, Set

from torch import Tensor

from megadit import models
from megadit.interop.strict import name_problems
from megadit.models import ModelConfig
from megadit.models.diffusers_format import DiffusersFormat

# Positions that SD3's class keeps as a buffer of its own.
THEIR_BUFFERS = {"pos_embed.pos_embed"}


def format_of(config: ModelConfig) -> DiffusersFormat:
    """How models of these settings look in diffusers. Raises ValueError for a family that diffusers does not have."""
    found = models.family_of(config).diffusers
    if found is None:
        raise ValueError(f"diffusers has no class for the model family {config.family}")
    return found()


def to_diffusers(config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict (or gradients) as diffusers has it; fixed tables and the REPA head are left out.

    Raises ValueError for tensors that are missing or that a model of this family does not have.
    """
    known = format_of(config)
    pairs = list(known.pairs(config))
    _require({name for name in ours if not name.startswith(known.left_out)}, {pair.ours for pair in pairs})
    theirs: dict[str, Tensor] = {}
    for pair in pairs:
        theirs |= zip(pair.theirs, pair.to_theirs(ours[pair.ours]), strict=True)
    return theirs


def from_diffusers(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of our model from a state dict of diffusers; `to_diffusers` is the inverse.

    Raises ValueError for tensors that are missing or that the class of diffusers does not have, and for a DiT whose
    blocks do not share one timestep and label embedding.
    """
    pairs = list(format_of(config).pairs(config))
    _require(theirs.keys() - THEIR_BUFFERS, {name for pair in pairs for name in pair.theirs})
    return {pair.ours: pair.to_ours([theirs[name] for name in pair.theirs]) for pair in pairs}


def _require(found: Set[str], expected: Set[str]) -> None:
    if problems := name_problems(found, expected):
        raise ValueError(f"the weights are not those of the model: of its tensors, {'; '.join(problems)}")
