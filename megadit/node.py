"""What every level of the recipe is made of."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def parse_power(value: Any) -> Any:
    """Read `2^-10` as 2.0 ** -10, so that recipes can state learning rates as the papers do."""
    if isinstance(value, str):
        if match := re.fullmatch(r"\s*([\d.]+)\s*(?:\^|\*\*)\s*([-+]?[\d.]+)\s*", value):
            base, exponent = match.groups()
        else:
            base, exponent = value, "1"
        try:
            return float(base) ** float(exponent)
        except (ValueError, ArithmeticError):  # no number, or none that is finite: the schema says so
            return value
    return value


Power = Annotated[float, BeforeValidator(parse_power)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Mark:
    """Whether a key of the recipe may change. A field has one in its annotation, or has that of its section."""

    in_stage: bool = False  # a stage may set it
    at_resume: bool = False  # a run may go on with another value, which is logged
    reason: str = ""  # why not


FREE = Mark(in_stage=True, at_resume=True)
STAGE = Mark(in_stage=True)


def identity(reason: str) -> Mark:
    """Of what a run keeps from its first step to its last."""
    return Mark(reason=reason)


UNMARKED = identity("it is not marked as a key that may")


class Node(BaseModel):
    """Base of every level of the tree: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
