"""Search spaces: which values of which recipe keys a sweep tries, and the points that a search takes of them.

`optimizer.lr=2^-9..2^-5` is a range, `model.width=32,64,128` a list. A value keeps the spelling that a recipe would
have, so a point is a list of overrides, and the name of its trial says what it is: `width=64,lr=2^-7,seed=1`.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megadit.recipe import Recipe

_POWER = re.compile(r"(?P<base>\d+)\^(?P<exponent>[-+]?\d+(\.\d+)?)")
_INTEGER = re.compile(r"\d+")
_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[{]*[\]}])")
_UNSAFE_IN_A_NAME = re.compile(r"[^\w.^+=,-]+")


@dataclass(frozen=True)
class Choices:
    """A list of values."""

    key: str
    values: tuple[str, ...]

    def grid(self) -> tuple[str, ...]:
        return self.values

    def at(self, uniform: float) -> str:
        """The value for a draw in [0, 1): all are as likely."""
        return self.values[int(uniform * len(self.values))]


@dataclass(frozen=True)
class PowerRange:
    """`2^-9..2^-5`: a grid has the whole exponents, a random search any exponent, to two decimals."""

    key: str
    base: str
    low: float
    high: float

    def grid(self) -> tuple[str, ...]:
        if not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"{self.key}: the grid of a range of powers needs whole exponents at its ends")
        return tuple(f"{self.base}^{exponent}" for exponent in range(int(self.low), int(self.high) + 1))

    def at(self, uniform: float) -> str:
        return f"{self.base}^{round(self.low + uniform * (self.high - self.low), 2):g}"


@dataclass(frozen=True)
class IntegerRange:
    """`0..2000`: a grid has every integer, in a random search all are as likely."""

    key: str
    low: int
    high: int

    def grid(self) -> tuple[str, ...]:
        return tuple(str(value) for value in range(self.low, self.high + 1))

    def at(self, uniform: float) -> str:
        return str(self.low + int(uniform * (self.high - self.low + 1)))


@dataclass(frozen=True)
class FloatRange:
    """`0.1..10`: for random search alone; log-uniform, or uniform where the range begins at 0."""

    key: str
    low: float
    high: float

    def grid(self) -> tuple[str, ...]:
        raise ValueError(
            f"{self.key}={self.low:g}..{self.high:g}: a grid needs a list (1,2,5), "
            "powers (2^-9..2^-5) or integers (0..2)"
        )

    def at(self, uniform: float) -> str:
        value = self.low * (self.high / self.low) ** uniform if self.low > 0 else uniform * self.high
        return f"{value:.4g}"


Dimension = Choices | PowerRange | IntegerRange | FloatRange
Point = tuple[str, ...]  # overrides of the recipe, one for each dimension


def parse_space(texts: Sequence[str]) -> list[Dimension]:
    """The dimensions of `KEY=VALUES` texts. Raises ValueError for one that is malformed, empty, or there twice."""
    dimensions = [_parse_dimension(text) for text in texts]
    keys = [dimension.key for dimension in dimensions]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"the space names {', '.join(twice)} twice; give each key once, as a list or a range")
    if not dimensions:
        raise ValueError("nothing to search: give a space, such as optimizer.lr=2^-9..2^-5")
    return dimensions


def grid(space: Sequence[Dimension]) -> list[Point]:
    """Every combination of values; the last key changes fastest. Raises ValueError for a range that has no grid."""
    values = [[f"{dimension.key}={value}" for value in dimension.grid()] for dimension in space]
    return list(itertools.product(*values))


def draw(space: Sequence[Dimension], num_points: int, seed: int) -> list[Point]:
    """`num_points` random combinations: the first n are the same however many are drawn."""
    uniform_ND = np.random.Generator(np.random.Philox(seed)).random((num_points, len(space)))
    return [
        tuple(f"{dimension.key}={dimension.at(value)}" for dimension, value in zip(space, row, strict=True))
        for row in uniform_ND.tolist()
    ]


def trial_name(point: Point) -> str:
    """A name for the folder of a point's trial: each key by its last part, or by more where two would be the same."""
    keys = [override.partition("=")[0] for override in point]
    values = [override.partition("=")[2] for override in point]
    parts = [f"{_short(key, keys)}={value}" for key, value in zip(keys, values, strict=True)]
    return _UNSAFE_IN_A_NAME.sub("_", ",".join(parts))


def paper_space(recipe: Recipe) -> list[str]:
    """The four hyperparameters of the muP search for MMDiT (arXiv 2505.15270): lr, clipping, REPA weight, warm-up.

    That these were searched at random, in 80 trials, is known; their ranges are not. The learning rates here are those
    of the paper's search for DiT. Clipping spans the customary 0.1 and the paper's best value 1; the REPA weight lies
    around that paper's default 0.5 (arXiv 2410.06940); warm-up takes at most a tenth of the run, or one step.
    Without an objective.repa in the recipe its weight is left out.
    """
    return [
        "optimizer.lr=2^-13..2^-9",
        "optimizer.max_grad_norm=0.05..10.0",
        *recipe.objective.paper_space,
        f"optimizer.warmup_steps=0..{max(1, recipe.num_steps // 10)}",
    ]


def _parse_dimension(text: str) -> Dimension:
    key, separator, values = (part.strip() for part in text.partition("="))
    if not (key and separator and values):
        raise ValueError(f"space {text!r} is not of the form KEY=1,2,5 or KEY=LOW..HIGH")
    if ".." in values:
        return _parse_range(key, values)
    choices = tuple(value.strip() for value in _COMMA_OUTSIDE_BRACKETS.split(values))
    if "" in choices:
        raise ValueError(f"space {text!r} has an empty value")
    if len(set(choices)) < len(choices):
        raise ValueError(f"space {text!r} has a value twice")
    return Choices(key, choices)


def _parse_range(key: str, values: str) -> Dimension:
    low, high = (end.strip() for end in values.split("..", 1))
    first, last = _POWER.fullmatch(low), _POWER.fullmatch(high)
    dimension: PowerRange | IntegerRange | FloatRange
    if first and last and first["base"] == last["base"] and int(first["base"]) > 1:
        dimension = PowerRange(key, first["base"], float(first["exponent"]), float(last["exponent"]))
    elif _INTEGER.fullmatch(low) and _INTEGER.fullmatch(high):
        dimension = IntegerRange(key, int(low), int(high))
    else:
        dimension = FloatRange(key, _number(key, low), _number(key, high))
        if dimension.low < 0:
            raise ValueError(f"{key}={values}: a range must not begin below 0")
    if dimension.low >= dimension.high:
        raise ValueError(f"{key}={values} is empty: a range goes from the smaller to the larger value")
    return dimension


def _number(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise ValueError(f"{key}: {text!r} is no end of a range; allowed: numbers, or powers of one base, such as 2^-9")
    return number


def _short(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    candidates = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
    taken = [other for other in keys if other != key]
    return next(name for name in candidates if not any(f".{other}".endswith(f".{name}") for other in taken))
