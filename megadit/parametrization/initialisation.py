"""Initial weights: a rule per parameter, as its family states it, and each value a function of (seed, name) alone."""

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from megadit.models import Family
from megadit.models.layers import Readout
from megadit.models.rules import Rule
from megadit.parametrization.spec import ParamSpec
from megadit.randomness import named_generator
from megadit.recipe import Parametrization


def rule_of(name: str, family: Family, parametrization: Parametrization) -> Rule:
    """The rule of a parameter. Raises ValueError for one that no pattern fits."""
    mup = parametrization.kind == "mup"
    for pattern, rule in family.initial[f"mup, {parametrization.adaln_init}" if mup else "sp"].items():
        if fnmatchcase(name, pattern):
            return rule
    raise ValueError(f"{name}: no initialisation is known for it in family {family.name}")


def standard_deviation(rule: Rule, base_dims: Sequence[int], hidden_mult: float) -> float:
    """Of a parameter whose dimensions in the base model are `base_dims`; 0 for the constant kinds."""
    if rule.kind in ("zero", "one"):
        return 0.0
    return _sigma(rule, base_dims) / math.sqrt(hidden_mult)


def _sigma(rule: Rule, dims: Sequence[int]) -> float:
    if not isinstance(rule.sigma, str):
        return rule.sigma
    if rule.sigma == "row":
        return dims[-1] ** -0.5
    receptive_field = math.prod(dims[2:])
    fan_in, fan_out = dims[1] * receptive_field, dims[0] * receptive_field
    if rule.sigma == "fan_in":
        return fan_in**-0.5
    if rule.sigma == "xavier_flat":
        fan_out = dims[0]
    return math.sqrt(2 / (fan_in + fan_out))


def initial_value(spec: ParamSpec, seed: int) -> Tensor:
    """The whole initial tensor, fp32, on the CPU; every engine computes it and keeps its part."""
    if spec.init == "zero":
        return torch.zeros(spec.shape)
    if spec.init == "one":
        return torch.ones(spec.shape)
    generator = named_generator(seed, spec.name)
    if spec.init == "normal":
        return torch.randn(spec.shape, generator=generator) * spec.init_std
    bound = math.sqrt(3) * spec.init_std  # of the uniform distribution with this standard deviation
    return torch.rand(spec.shape, generator=generator) * (2 * bound) - bound


def initialise(model: nn.Module, specs: Iterable[ParamSpec], seed: int) -> None:
    """Give a plain (unsharded) model its initial weights and its readout multipliers."""
    specs = list(specs)
    with torch.no_grad():
        for spec in specs:
            model.get_parameter(spec.name).copy_(initial_value(spec, seed))
    set_multipliers(model, specs)


def readout_multipliers(specs: Iterable[ParamSpec]) -> dict[str, float]:
    """Forward multiplier by module name, of every Readout."""
    return {spec.name.removesuffix(".weight"): spec.multiplier for spec in specs if spec.role == "output"}


def set_multipliers(model: nn.Module, specs: Iterable[ParamSpec]) -> None:
    """Set the forward multiplier of every Readout; works on meta and on sharded models."""
    for name, multiplier in readout_multipliers(specs).items():
        module = model.get_submodule(name)
        assert isinstance(module, Readout), f"{name} is a {type(module).__name__}"
        module.multiplier = multiplier
