"""The parameter table: role, width multiplier, initialisation, learning rate and weight decay of every parameter.

Computed from the recipe on the meta device, before anything is sharded (Tensor Programs V, arXiv 2203.03466, table 8,
for Adam). A trainable parameter without a role is an error.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn

from megadit import models
from megadit.models import ModelConfig
from megadit.models.layers import Readout
from megadit.optimizers import OptimizerConfig, Scaling
from megadit.parametrization import base_shapes
from megadit.parametrization.base_shapes import BaseShapes
from megadit.parametrization.groups import param_groups
from megadit.parametrization.initialisation import rule_of, standard_deviation
from megadit.parametrization.spec import ParamSpec, Role
from megadit.recipe import Parametrization, Recipe


@dataclass(frozen=True)
class _Asked:
    """What a table is a function of."""

    model: ModelConfig
    parametrization: Parametrization
    optimizer: OptimizerConfig
    shapes: bytes  # the contents of the file
    recipe: Recipe = field(compare=False)


def build_table(recipe: Recipe) -> list[ParamSpec]:
    """One ParamSpec per trainable parameter, in the model's order. A plan asks hundreds of times: the last are kept.

    Raises ValueError for base shapes that do not fit the model, and for a parameter that has no role.
    """
    file = recipe.parametrization.base_shapes
    shapes = base_shapes.resolve(file).read_bytes() if file is not None else b""
    return list(_build(_Asked(recipe.model, recipe.parametrization, recipe.optimizer, shapes, recipe)))


@lru_cache(maxsize=8)
def _build(asked: _Asked) -> list[ParamSpec]:
    recipe = asked.recipe
    model = base_shapes.meta_model(recipe.model)
    if recipe.parametrization.kind == "sp":
        return table_of(model, None, recipe)
    source = recipe.parametrization.base_shapes or f"base_width {recipe.parametrization.base_width}"
    shapes = base_shapes.of_recipe(recipe)
    base_shapes.require_match(shapes, model, source)
    return table_of(model, shapes, recipe)


def table_of(model: nn.Module, shapes: BaseShapes | None, recipe: Recipe) -> list[ParamSpec]:
    """The table of a model of the recipe's family. Without `shapes` nothing is a width.

    Raises ValueError for a parameter without a role, or without a rule for its initial value.
    """
    parametrization, family = recipe.parametrization, models.family_of(recipe.model)
    specs = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        shape = tuple(parameter.shape)
        base = shapes[name] if shapes is not None else (None,) * len(shape)
        role = _role(name, leaf in family.tables, module, base)
        m = _width_mult(shape, base)
        hidden_mult = m if role == "hidden" else 1.0
        rule = rule_of(name, family, parametrization)
        base_dims = [size if dim is None else dim for size, dim in zip(shape, base, strict=True)]
        scaling = Scaling(hidden_mult, role == "vector", parametrization.decay_exponent, parametrization.scale_eps)
        specs.append(
            ParamSpec(
                name=name,
                shape=shape,
                role=role,
                width_mult=m,
                init=rule.kind,
                init_std=standard_deviation(rule, base_dims, hidden_mult),
                hyperparameters=recipe.optimizer.hyperparameters(scaling),
                multiplier=parametrization.output_mult / m if role == "output" else 1.0,
            )
        )
    return specs


def to_rows(specs: Iterable[ParamSpec]) -> list[dict[str, Any]]:
    """The table for JSON."""
    return [
        {key: value for key, value in asdict(spec).items() if key != "hyperparameters"}
        | {"shape": list(spec.shape), **spec.hyperparameters}
        for spec in specs
    ]


def format_table(specs: Sequence[ParamSpec]) -> str:
    """The table as aligned text; the last lines have the optimizer's groups and the number of parameters."""
    rows = [("name", "shape", "role", "m", "init", "multiplier", "lr", "weight decay")]
    for spec in specs:
        init = spec.init if spec.init in ("zero", "one") else f"{spec.init} {spec.init_std:.4g}"
        shape = " x ".join(map(str, spec.shape))
        rows.append(
            (
                spec.name,
                shape,
                spec.role,
                f"{spec.width_mult:g}",
                init,
                f"{spec.multiplier:g}",
                f"{spec.hyperparameters['lr']:.4g}",
                f"{spec.hyperparameters['weight_decay']:.4g}",
            )
        )
    total = sum(math.prod(spec.shape) for spec in specs)
    return "\n".join([*_align(rows), "", *_align(_group_rows(specs)), f"{len(specs)} tensors, {_count(total)}"])


def _group_rows(specs: Sequence[ParamSpec]) -> list[tuple[str, ...]]:
    """One row for every group of the optimizer: what is trained alike."""
    by_name = {spec.name: spec for spec in specs}
    names = [name.replace("_", " ") for name in specs[0].hyperparameters]
    rows: list[tuple[str, ...]] = [(*names, "tensors", "roles", "")]
    for group in param_groups(specs):
        members = [by_name[name] for name in group.names]
        roles = ", ".join(dict.fromkeys(spec.role for spec in members))
        count = _count(sum(math.prod(spec.shape) for spec in members))
        values = [f"{value:.4g}" for value in group.hyperparameters.values()]
        rows.append((*values, str(len(members)), roles, count))
    return rows


def _count(number: int) -> str:
    rounded = f" ({number / 1e9:.1f}B)" if number >= 10**9 else f" ({number / 1e6:.1f}M)" if number >= 10**6 else ""
    return f"{number:,} parameters{rounded}"


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _role(name: str, is_table: bool, module: nn.Module, base: tuple[int | None, ...]) -> Role:
    """The role of a parameter from the module that owns it and from which of its dimensions are widths."""
    if len(base) == 1:
        return "vector"
    is_width = [dim is not None for dim in base]
    if isinstance(module, nn.Embedding) or is_table:
        if len(base) == 2 and not is_width[0]:
            return "input" if is_width[1] else "finite"
        raise ValueError(f"{name}: the rows of a table must not be a width, and a row has one dimension")
    if not isinstance(module, nn.Linear | nn.Conv2d) or any(is_width[2:]):
        raise ValueError(
            f"{name}: no role is known for a parameter with {len(base)} dimensions of a {type(module).__name__}; "
            "muP covers linear layers, patch embeddings (Conv2d), embeddings, the family's tables and vectors"
        )
    out_is_width, in_is_width = is_width[:2]
    if isinstance(module, Readout):
        if out_is_width:
            raise ValueError(f"{name}: a Readout must not map to a width")
        return "output"
    if out_is_width:
        return "hidden" if in_is_width else "input"
    if in_is_width:
        raise ValueError(f"{name}: a layer from width to something that is not width must be a Readout")
    return "finite"


def _width_mult(shape: tuple[int, ...], base: tuple[int | None, ...]) -> float:
    """Size over base size of the last dimension that is a width (the fan-in of a hidden matrix); 1 without one."""
    for size, base_size in reversed(list(zip(shape, base, strict=True))):
        if base_size is not None:
            return size / base_size
    return 1.0
