"""Optimizer groups from the parameter table."""

from collections.abc import Iterable
from dataclasses import dataclass

from megadit.parametrization.spec import ParamSpec


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share all their hyperparameters."""

    lr: float
    weight_decay: float
    eps: float
    names: tuple[str, ...]


def param_groups(specs: Iterable[ParamSpec]) -> list[ParamGroup]:
    """Group parameters with equal learning rate, weight decay and eps; groups and names in the order of the table."""
    names: dict[tuple[float, float, float], list[str]] = {}
    for spec in specs:
        names.setdefault((spec.lr, spec.weight_decay, spec.eps), []).append(spec.name)
    return [ParamGroup(*key, tuple(members)) for key, members in names.items()]
