"""An optimizer from outside of the package: steps by about the sign of an average of gradients (a smooth Lion)."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from megadit.node import Fraction, Power
from megadit.optimizers import OPTIMIZERS, OptimizerConfig, OptimizerKind, Scaling


class ToySignConfig(OptimizerConfig):
    kind: Literal["toy_sign"] = "toy_sign"
    memory: Fraction = 0.9
    small: Annotated[Power, Field(gt=0)] = 2.0**-10

    def hyperparameters(self, scaling: Scaling) -> dict[str, float]:
        """A step is as long as Adam's, so width scales the rate as Adam's, and `small` as its eps."""
        m = scaling.hidden_mult
        return {"lr": self.lr / m, "weight_decay": self.base_decay(scaling) * m, "small": self.small / m}


class ToySign(torch.optim.Optimizer):
    def __init__(self, groups: Iterable[dict[str, Any]], memory: float) -> None:
        super().__init__(groups, {"memory": memory})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for weights in group["params"]:
                average = self.state[weights].setdefault("average", torch.zeros_like(weights))
                average.lerp_(weights.grad, 1 - group["memory"])
                step = average / (average.abs() + group["small"])
                weights.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])


OPTIMIZERS.add(
    "toy_sign",
    OptimizerKind(
        config=ToySignConfig, slots=("average",), build=lambda groups, config: ToySign(groups, config.memory)
    ),
)
