"""The samplers of the evaluation protocols by name, and what each is told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from megadit.recipe import SamplerName
from megadit.sampling import ddpm, flow
from megadit.sampling.guidance import Predict

NAMES: tuple[str, ...] = get_args(SamplerName)
BY_OBJECTIVE: dict[str, tuple[str, ...]] = {"ddpm": ("ddpm", "dpm++"), "flow": ("euler", "heun")}  # the default first
DEFAULT_STEPS: dict[str, int] = {"ddpm": 250, "dpm++": 20, "euler": 28, "heun": 28}  # of DiT, PixArt-alpha and SD3


@dataclass(frozen=True)
class Sampler:
    """How noise becomes an image; part of a folder's manifest. `shift` (of times to noise) is for flow only."""

    name: str
    num_steps: int
    shift: float = 1.0

    def sample(self, predict: Predict, x_BCHW: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """From noise to images [B, C, H, W]; `draws[i]`, on the CPU, gives the noise that is added to image i."""
        functions: dict[str, Callable[[], Tensor]] = {
            "ddpm": lambda: ddpm.denoise(predict, x_BCHW, self.num_steps, draws),
            "dpm++": lambda: ddpm.solve(predict, x_BCHW, self.num_steps),
            "euler": lambda: flow.euler(predict, x_BCHW, self.num_steps, self.shift),
            "heun": lambda: flow.heun(predict, x_BCHW, self.num_steps, self.shift),
        }
        return functions[self.name]()

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        shift = {"shift": self.shift} if self.name in BY_OBJECTIVE["flow"] else {}
        return {"name": self.name, "num_steps": self.num_steps, **shift}


def choose(
    objective: str, name: str | None = None, num_steps: int | None = None, shift: float | None = None
) -> Sampler:
    """The sampler of a model's objective ("ddpm" or "flow"). Raises ValueError for what does not go together."""
    possible = BY_OBJECTIVE[objective]
    name = name or possible[0]
    if name not in NAMES:
        raise ValueError(f"no sampler {name!r}: there are {', '.join(NAMES)}")
    if name not in possible:
        raise ValueError(f"sampler {name} is not for objective.kind {objective}, which has {', '.join(possible)}")
    if shift is not None and objective != "flow":
        raise ValueError(f"--shift is for samplers of flow ({', '.join(BY_OBJECTIVE['flow'])}), not {name}")
    if shift is not None and shift <= 0:
        raise ValueError(f"shift {shift} must be above 0; 1 is none")
    steps = num_steps or DEFAULT_STEPS[name]
    if objective == "ddpm":
        ddpm.check_num_steps(steps)
    return Sampler(name, steps, shift or 1.0)
