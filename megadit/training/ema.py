"""Averages of the weights over training, sharded exactly as the weights are, in fp32.

A constant rate is the usual exponential moving average: it remembers about 1 / (1 - rate) steps. A power function
(EDM2, arXiv 2312.02696, section 3.1) remembers a fixed share of the training so far, however long that is, and forgets
where it started. The share is given as the standard deviation of the average's weights over time, relative to the
length of training so far.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megadit.engines.base import Shard
from megadit.recipe import average_names


class Averages:
    """One average for each rate and each relative standard deviation; it starts as the initial weights."""

    def __init__(self, shards: Mapping[str, Shard], rates: Sequence[float], power_stds: Sequence[float] = ()) -> None:
        self._names = list(shards)
        self._weights = [shards[name].values for name in self._names]
        self._rates = dict(zip(average_names(rates, ()), rates, strict=True))
        exponents = [exponent_of_std(std) for std in power_stds]
        self._exponents = dict(zip(average_names((), power_stds), exponents, strict=True))
        self._averages = {
            name: [weight.clone() for weight in self._weights] for name in average_names(rates, power_stds)
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps (images seen / batch size, so steps that were skipped count).

        average = rate * average + (1 - rate) * weight, where a power function has the rate of its step. Not called for
        a skipped step: weights that stood still are not taken in twice.
        """
        rates = self._rates | {name: rate_of_step(exponent, step) for name, exponent in self._exponents.items()}
        for name, rate in rates.items():
            torch._foreach_lerp_(self._averages[name], self._weights, 1 - rate)

    def by_name(self) -> dict[str, dict[str, Tensor]]:
        """Average name ("ema_0.999", "ema_std0.1") -> parameter name -> flat values, as views."""
        return {name: dict(zip(self._names, values, strict=True)) for name, values in self._averages.items()}


def exponent_of_std(relative_std: float) -> float:
    """The exponent gamma of the power function t^gamma whose standard deviation on [0, 1] is `relative_std`.

    The variance is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (arXiv 2312.02696, section 3.1): a cubic, whose
    largest root is meant. `relative_std` is above 0 and at most 12^-1/2, where gamma is 0 and all weights count alike.
    """
    inverse = relative_std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def rate_of_step(exponent: float, step: int) -> float:
    """How much of the average stays at step `step`, from 1: (1 - 1/step)^(gamma + 1) (arXiv 2312.02696, section 3.1).

    The first step's is 0, so the initial weights leave the average.
    """
    return float((1 - 1 / step) ** (exponent + 1))
