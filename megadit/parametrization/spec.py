"""The row of the parameter table: all that the parametrization decides about one tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megadit.models.rules import InitKind

# By which dimensions are widths: none, the fan-out alone (and the rows of tables and embeddings), fan-out and fan-in;
# "output" is the weight of a Readout, "vector" everything one-dimensional.
Role = Literal["finite", "input", "hidden", "output", "vector"]


@dataclass(frozen=True)
class ParamSpec:
    """One trainable parameter."""

    name: str
    shape: tuple[int, ...]
    role: Role
    width_mult: float  # width / base width of the last dimension that is a width; 1 without one
    init: InitKind
    init_std: float  # 0 for the constant kinds
    hyperparameters: Mapping[str, float]  # of the optimizer: lr, weight_decay, and what the optimizer has beside them
    multiplier: float = 1.0  # in the forward pass; other than 1 only for weights of Readout
