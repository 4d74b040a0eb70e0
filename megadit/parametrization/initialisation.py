"""Initial weights: a rule per kind of parameter, and each value a function of (seed, parameter name) alone.

The rules (m = width multiplier; fans are the tensor's own). Under muP they follow DiT/models_mup.py of
ML-GSAI/Scaling-Diffusion-Transformers-muP, except that adaLN-Zero stays by default: zero initialisation of hidden
matrices leaves their updates maximal.

| parameter                     | mup                              | sp                                         |
|-------------------------------|----------------------------------|--------------------------------------------|
| input matrix                  | normal, 1/sqrt(fan_in)           | xavier_uniform, sqrt(2/(fan_in + fan_out)) |
| hidden matrix                 | normal, 1/sqrt(base fan_in * m)  | xavier_uniform                             |
| modulation, adaln_init normal | as a hidden matrix               | normal, 1/sqrt(fan_in)                     |
| modulation, adaln_init zero   | 0                                | 0                                          |
| readout                       | 0                                | 0                                          |
| norm weight                   | 1                                | 1                                          |
| bias                          | 0                                | 0                                          |
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megadit.models.layers import Modulation, Readout
from megadit.parametrization.spec import InitKind, ParamSpec
from megadit.randomness import named_generator
from megadit.recipe import Parametrization


def rule(
    module: nn.Module, leaf: str, parameter: Tensor, width_mult: float, recipe: Parametrization
) -> tuple[InitKind, float]:
    """Kind and standard deviation of the initial value of `module.leaf`; see the table above."""
    if parameter.ndim == 1:
        return ("zero", 0.0) if leaf == "bias" else ("one", 0.0)
    assert isinstance(module, nn.Linear), type(module)
    fan_out, fan_in = parameter.shape
    is_modulation = isinstance(module, Modulation)
    if isinstance(module, Readout) or (is_modulation and recipe.adaln_init == "zero"):
        return "zero", 0.0
    if recipe.kind == "sp" and not is_modulation:
        return "xavier_uniform", math.sqrt(2 / (fan_in + fan_out))
    base_fan_in = fan_in / width_mult
    return "normal", base_fan_in**-0.5 * width_mult**-0.5


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
