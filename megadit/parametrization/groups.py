"""Optimizer groups from the parameter table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megadit.parametrization.spec import ParamSpec


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share all their hyperparameters."""

    hyperparameters: Mapping[str, float]
    names: tuple[str, ...]


def param_groups(specs: Iterable[ParamSpec]) -> list[ParamGroup]:
    """Group parameters with equal hyperparameters; groups and names in the order of the table."""
    names: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for spec in specs:
        names.setdefault(tuple(spec.hyperparameters.items()), []).append(spec.name)
    return [ParamGroup(dict(key), tuple(members)) for key, members in names.items()]
