"""Base shapes: for every parameter, which dimensions are widths and how large they are in the base model.

They come from comparing two models on the meta device, or from a .bsh file of microsoft/mup: YAML `name: [dims]`,
with null for a dimension that is not a width.
"""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from torch import nn

from megadit import models
from megadit.files import write_text
from megadit.models import ModelConfig
from megadit.recipe import Recipe

# Per parameter and dimension the size in the base model, or None for a dimension that is not a width.
BaseShapes = Mapping[str, tuple[int | None, ...]]

_HEADER = """\
# Base shapes in the format of microsoft/mup (YAML): the size of each dimension in the base model,
# or null for a dimension that is not a width.
"""


def meta_model(config: ModelConfig) -> nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return models.build(config)


def at_width(config: ModelConfig, width: int) -> ModelConfig:
    """The same model with another number of heads. Raises ValueError where the width has no whole number of them."""
    if width % config.head_dim:
        raise ValueError(f"base_width {width} must be a multiple of model.head_dim {config.head_dim}")
    return type(config).model_validate(config.model_dump() | {"width": width})


def compare(base: nn.Module, delta: nn.Module) -> BaseShapes:
    """Base shapes from two models that differ in width alone; a dimension that differs is a width."""
    base_shapes, delta_shapes = _shapes(base), _shapes(delta)
    _require_same_names(base_shapes, delta_shapes, "the base model", "the delta model")
    found = {
        name: tuple(None if b == d else b for b, d in zip(shape, delta_shapes[name], strict=True))
        for name, shape in base_shapes.items()
    }
    _require_a_width(found, "the base and the delta model")
    return found


def of_recipe(recipe: Recipe) -> BaseShapes:
    """The base shapes that a muP recipe asks for, by file or by base width."""
    parametrization = recipe.parametrization
    if parametrization.base_shapes is not None:
        return load(resolve(parametrization.base_shapes))
    return _from_width(recipe)


def make(recipe: Recipe, path: Path) -> None:
    """Write the base shapes of a recipe that states `parametrization.base_width` to a .bsh file."""
    save(_from_width(recipe), path)


def load(path: Path) -> BaseShapes:
    """Read a .bsh file. Raises ValueError for one that is not of the format, or in which nothing is a width."""
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{path}: a base-shape file maps parameter names to lists of dimensions")
    for name, dims in tree.items():
        if not isinstance(dims, list) or not all(d is None or (type(d) is int and d > 0) for d in dims):
            raise ValueError(f"{path}: {name}: {dims!r} is not a list of positive integers and null")
    shapes = {name: tuple(dims) for name, dims in tree.items()}
    _require_a_width(shapes, str(path))
    return shapes


def save(shapes: BaseShapes, path: Path) -> None:
    """Write a .bsh file that microsoft/mup reads too."""
    text = yaml.safe_dump({name: list(dims) for name, dims in sorted(shapes.items())}, indent=4)
    write_text(path, _HEADER + text)


def resolve(name: str) -> Path:
    """The .bsh file of that path, or the shipped one of that name (with or without `.bsh`)."""
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(files("megadit.shapes")))
    shipped = folder / f"{name.removesuffix('.bsh')}.bsh"
    if shipped.is_file():
        return shipped
    known = ", ".join(sorted(p.name for p in folder.glob("*.bsh")))
    raise ValueError(f"no base-shape file {name!r}: give a path, or one of the shipped {known}")


def require_match(shapes: BaseShapes, model: nn.Module, source: str) -> None:
    """Raise ValueError unless the base shapes name the model's parameters, with as many dimensions each.

    They may name its buffers too: in published files DiT's fixed positions are a parameter.
    """
    target = _shapes(model)
    buffers = {name for name, _ in model.named_buffers()}
    _require_same_names({n: s for n, s in shapes.items() if n not in buffers}, target, source, "the model")


def _from_width(recipe: Recipe) -> BaseShapes:
    width = recipe.parametrization.base_width
    if width is None:
        raise ValueError(
            "base shapes are made from parametrization.base_width, which this recipe does not state: "
            "set parametrization.base_width=WIDTH parametrization.base_shapes=null parametrization.kind=mup"
        )
    base, delta = at_width(recipe.model, width), at_width(recipe.model, width + recipe.model.head_dim)
    return compare(meta_model(base), meta_model(delta))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _require_same_names(
    a: Mapping[str, tuple[int | None, ...]], b: Mapping[str, tuple[int | None, ...]], a_name: str, b_name: str
) -> None:
    only = [f"{name} (only in {a_name})" for name in a if name not in b]
    only += [f"{name} (only in {b_name})" for name in b if name not in a]
    if only:
        raise ValueError(f"{a_name} and {b_name} have different parameters: {_first(only)}")
    ranks = [f"{name} ({list(a[name])} and {list(b[name])})" for name in a if len(a[name]) != len(b[name])]
    if ranks:
        raise ValueError(f"{a_name} and {b_name} differ in the number of dimensions of {_first(ranks)}")


def _require_a_width(shapes: BaseShapes, source: str) -> None:
    if not any(dim is not None for dims in shapes.values() for dim in dims):
        raise ValueError(f"{source}: no dimension is a width, so muP would silently be the standard parametrization")


def _first(items: Iterable[str]) -> str:
    listed = list(items)
    rest = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + rest
