"""Exponential moving averages of the weights, sharded exactly as the weights are, in fp32."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megadit.engines.base import Shard


class Averages:
    """One average per rate; `update` after every optimizer step makes ema = rate * ema + (1 - rate) * weight."""

    def __init__(self, shards: Mapping[str, Shard], rates: Sequence[float]) -> None:
        self._names = list(shards)
        self._weights = [shards[name].values for name in self._names]
        self._averages = {rate: [weight.clone() for weight in self._weights] for rate in rates}

    @torch.no_grad()
    def update(self) -> None:
        for rate, averages in self._averages.items():
            torch._foreach_lerp_(averages, self._weights, 1 - rate)

    def by_name(self) -> dict[str, dict[str, Tensor]]:
        """Average name ("ema_0.999") -> parameter name -> flat values, as views."""
        return {
            average_name(rate): dict(zip(self._names, averages, strict=True))
            for rate, averages in self._averages.items()
        }


def average_name(rate: float) -> str:
    return f"ema_{rate:g}"
