"""Initial weights: a rule per parameter of each family, and each value a function of (seed, parameter name) alone.

RULES has the tables of the official code of arXiv 2505.15270 (ML-GSAI/Scaling-Diffusion-Transformers-muP): DiT from
DiT/models_mup.py and DiT/models.py, PixArt from PixArt-alpha/.../PixArt.py with mup_init on and off. MMDiT, whose code
was not released, has the rules of DiT.

A rule gives sigma, the standard deviation at base width; fans are those of the base model. Under muP a hidden matrix
gets sigma / sqrt(m), everything else sigma. Without base shapes the base model is the model, and m is 1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from megadit.models.layers import Readout
from megadit.parametrization.spec import InitKind, ParamSpec
from megadit.randomness import named_generator
from megadit.recipe import Parametrization


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

# family -> parametrization -> pattern of names -> rule; the first pattern that fits holds.
Rules = Mapping[str, Rule]
_DIT: Rules = {
    "final_layer.linear.weight": ZERO,
    "y_embedder.embedding_table.weight": N_1,
    "*.weight": FAN_IN,
    "*.bias": ZERO,
}
_PIXART: Rules = {
    "final_layer.linear.weight": ZERO,
    "x_embedder.proj.weight": XAVIER,
    "t_embedder.mlp.*.weight": N_002,
    "t_block.1.weight": N_002,
    "y_embedder.y_proj.*.weight": N_002,
    "*scale_shift_table": N_002,
    "blocks.*.cross_attn.proj.weight": ZERO,
    "blocks.*.weight": XAVIER,
    "*.bias": ZERO,
}
_MMDIT: Rules = {
    "readout.weight": ZERO,
    "blocks.*.qk_norm.*": ONE,
    "*.weight": FAN_IN,
    "*.bias": ZERO,
}


def _changed(rules: Rules, changes: Rules) -> Rules:
    """`rules` with others in place of some, which are asked first."""
    return {**changes, **{pattern: rule for pattern, rule in rules.items() if pattern not in changes}}


RULES: Mapping[str, Mapping[str, Rules]] = {
    "dit": {
        "mup, paper": _DIT,
        "mup, zero": _changed(_DIT, {"*.adaLN_modulation.1.weight": ZERO, "y_embedder.embedding_table.weight": N_002}),
        "sp": {
            "final_layer.linear.weight": ZERO,
            "*.adaLN_modulation.1.weight": ZERO,
            "x_embedder.proj.weight": XAVIER_FLAT,
            "t_embedder.mlp.*.weight": N_002,
            "y_embedder.embedding_table.weight": N_002,
            "*.weight": XAVIER,
            "*.bias": ZERO,
        },
    },
    "pixart": {
        "mup, paper": _PIXART,
        "mup, zero": _changed(_PIXART, {"t_block.1.weight": ZERO, "*scale_shift_table": ZERO}),
        "sp": _changed(_PIXART, {"x_embedder.proj.weight": XAVIER_FLAT, "*scale_shift_table": ROW}),
    },
    "mmdit": {
        "mup, paper": _MMDIT,
        "mup, zero": _changed(_MMDIT, {"*modulation.weight": ZERO}),
        "sp": _changed(_MMDIT, {"readout.weight": ZERO, "*modulation.weight": ZERO, "*.weight": XAVIER}),
    },
}


def rule_of(name: str, family: str, parametrization: Parametrization) -> Rule:
    """The rule of a parameter. Raises ValueError for one that no pattern fits."""
    mup = parametrization.kind == "mup"
    rules = RULES[family][f"mup, {parametrization.adaln_init}" if mup else "sp"]
    for pattern, rule in rules.items():
        if fnmatchcase(name, pattern):
            return rule
    raise ValueError(f"{name}: no initialisation is known for it in family {family}")


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
