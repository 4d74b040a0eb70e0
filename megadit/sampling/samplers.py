"""The sampler of a model: one of those of its objective, with what it is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadit.objectives import OBJECTIVES, ObjectiveConfig, kind_of, sampler_names
from megadit.objectives.objective import Predict, SamplerKind


@dataclass(frozen=True)
class Sampler:
    """How noise becomes an image; part of the manifest of a folder of generated ones."""

    name: str
    kind: SamplerKind
    num_steps: int
    shift: float = 1.0  # of times to noise, where it takes one

    def sample(self, predict: Predict, x_BCHW: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """From noise to images [B, C, H, W]; `draws[i]`, on the CPU, gives the noise that is added to image i."""
        given = {"draws": draws, "shift": self.shift}
        return self.kind.run(predict, x_BCHW, self.num_steps, **{name: given[name] for name in self.kind.takes})

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        shift = {"shift": self.shift} if "shift" in self.kind.takes else {}
        return {"name": self.name, "num_steps": self.num_steps, **shift}


def choose(
    objective: ObjectiveConfig, name: str | None = None, num_steps: int | None = None, shift: float | None = None
) -> Sampler:
    """A sampler of the objective, by default its first. Raises ValueError for what does not go together."""
    possible = kind_of(objective).samplers
    name = name or next(iter(possible))
    if name not in sampler_names():
        raise ValueError(f"no sampler {name!r}: there are {', '.join(sampler_names())}")
    if name not in possible:
        raise ValueError(f"sampler {name} is not for objective.kind {objective.kind}, which has {', '.join(possible)}")
    kind = possible[name]
    if shift is not None and "shift" not in kind.takes:
        raise ValueError(f"--shift is for samplers of {_which_take('shift')}, not {name}")
    if shift is not None and shift <= 0:
        raise ValueError(f"shift {shift} must be above 0; 1 is none")
    steps = kind.default_steps if num_steps is None else num_steps
    fewest, most = kind.steps
    if not fewest <= steps <= most:
        allowed = f"at least {fewest}" if most == float("inf") else f"in [{fewest}, {most}]"
        raise ValueError(f"num_steps {steps} must be {allowed} for sampler {name} of objective.kind {objective.kind}")
    return Sampler(name, kind, steps, 1.0 if shift is None else shift)


def _which_take(setting: str) -> str:
    """Objectives with those of their samplers that take a setting."""
    found = {
        kind: [name for name, sampler in OBJECTIVES.get(kind).samplers.items() if setting in sampler.takes]
        for kind in OBJECTIVES.names
    }
    return " or ".join(f"{kind} ({', '.join(names)})" for kind, names in found.items() if names)
