"""AdamW (arXiv 1711.05101), torch's fused one."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from megadit.node import STAGE, Fraction, Power
from megadit.optimizers.optimizer import SAME_STATE, OptimizerConfig, OptimizerKind, Scaling


class AdamWConfig(OptimizerConfig):
    kind: Annotated[Literal["adamw"], SAME_STATE] = "adamw"
    betas: Annotated[tuple[Fraction, Fraction], STAGE] = (0.9, 0.999)
    eps: Annotated[Power, Field(gt=0), STAGE] = 1e-8

    def hyperparameters(self, scaling: Scaling) -> dict[str, float]:
        """The rule for Adam of Tensor Programs V (arXiv 2203.03466, table 8)."""
        m = scaling.hidden_mult
        return {
            "lr": self.lr / m,
            "weight_decay": self.base_decay(scaling) * m ** (1 - scaling.decay_exponent),
            "eps": self.eps / m if scaling.scale_eps else self.eps,
        }


def _build(groups: Iterable[dict[str, Any]], config: AdamWConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=config.betas, fused=True)


ADAMW = OptimizerKind(config=AdamWConfig, slots=("exp_avg", "exp_avg_sq"), build=_build, counts_steps=True)
