"""The vocabulary of initial weights: what a family states, and `megadit.parametrization` computes.

A rule gives sigma, the standard deviation at base width; fans are those of the base model. Under muP a hidden matrix
gets sigma / sqrt(m), everything else sigma. Without base shapes the base model is the model, and m is 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

InitKind = Literal["normal", "uniform", "zero", "one"]


@dataclass(frozen=True)
class Rule:
    """A distribution and sigma: a number, or the name of a function of the fans."""

    kind: InitKind
    sigma: float | str = 0.0


ZERO, ONE = Rule("zero"), Rule("one")
FAN_IN = Rule("normal", "fan_in")  # 1 / sqrt(fan_in): kaiming_normal with a = 1
XAVIER = Rule("uniform", "xavier")  # sqrt(2 / (fan_in + fan_out))
XAVIER_FLAT = Rule("uniform", "xavier_flat")  # the same of a convolution's weight viewed as a matrix
ROW = Rule("normal", "row")  # 1 / sqrt(length of a row)
N_002, N_1 = Rule("normal", 0.02), Rule("normal", 1.0)

Rules = Mapping[str, Rule]  # pattern of parameter names -> rule; the first pattern that fits holds


def changed(rules: Rules, changes: Rules) -> Rules:
    """`rules` with others in place of some, which are asked first."""
    return {**changes, **{pattern: rule for pattern, rule in rules.items() if pattern not in changes}}
