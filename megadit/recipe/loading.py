"""From YAML to a recipe and back.

`load("quickstart", ["optimizer.lr=2^-8"])` reads a shipped recipe by name or any file by path, merges what it
`extends`, applies `key.sub=value` overrides and validates. An error names the key, quotes the value and says what is
allowed.
"""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megadit.models import FAMILIES
from megadit.node import Node
from megadit.recipe.schema import SECTIONS, Recipe

RECIPE_FOLDER = Path(str(files("megadit.recipes")))


class RecipeError(ValueError):
    """A recipe that cannot be used: what was wrong, where, and what is allowed."""


def load(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load the recipe `source` (a shipped name or a path) with `key.sub=value` overrides.

    Raises RecipeError for everything that a user can get wrong.
    """
    tree = _read_tree(resolve(source), seen=())
    for override in overrides:
        _apply_override(tree, override)
    return parse(tree, str(source))


def parse(tree: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a plain tree, as read from YAML; the modules that it imports are imported."""
    tree = dict(tree)
    _import_modules(tree.get("imports"), source)
    _apply_preset(tree)
    stated, lines = dict(tree), []
    for name in SECTIONS.keys() & tree.keys():
        try:
            tree[name] = _validated_section(name, tree[name])
        except ValidationError as error:
            lines += [_explain(item, (name, *item["loc"]), stated) for item in error.errors()]
        except RecipeError as error:
            lines.append(str(error))
        else:
            continue
        del tree[name]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        left_out = [(name,) for name in stated.keys() - tree.keys()]
        # A check of the whole has nothing to say of one that lacks a section.
        items = [item for item in error.errors() if item["loc"] not in left_out and (item["loc"] or not lines)]
        lines += [_explain(item, item["loc"], stated) for item in items]
    if lines:
        raise RecipeError(f"{source}: " + "; ".join(lines))
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `parse(yaml.safe_load(dump(r))) == r`."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def resolve(source: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
    elif (RECIPE_FOLDER / f"{source}.yaml").is_file():
        return RECIPE_FOLDER / f"{source}.yaml"
    shipped = sorted(p.stem for p in RECIPE_FOLDER.glob("*.yaml"))
    raise RecipeError(f"no recipe {str(source)!r}: give the path of a .yaml file or one of {', '.join(shipped)}")


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(
            f"{path}: recipes extend each other in a circle: {' -> '.join(p.name for p in (*seen, path))}"
        )
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a YAML mapping, not {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    is_file = Path(str(parent)).suffix in (".yaml", ".yml")
    return _merge(_read_tree(resolve(path.parent / parent if is_file else str(parent)), (*seen, path)), tree)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r} is not of the form key.sub=value")
    *parents, leaf = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: not a YAML value: {error}") from None


def _import_modules(names: Any, source: str) -> None:
    """Import what adds families, objectives and optimizers. What is no list of names is an error of the schema."""
    for name in names if isinstance(names, list | tuple) else ():
        try:
            importlib.import_module(str(name))
        except ImportError as error:
            raise RecipeError(
                f"{source}: imports: cannot import {name!r}: {error}; a module must be installed or on PYTHONPATH"
            ) from None


def _apply_preset(tree: dict[str, Any]) -> None:
    """Put the settings that `model.preset` stands for below those that the section states itself."""
    model = tree.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    name, presets = model["preset"], all_presets()
    if name not in presets:
        close = difflib.get_close_matches(str(name), presets, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(presets)}"
        raise RecipeError(f"unknown model.preset {name!r}; {hint}")
    tree["model"] = presets[name] | {key: value for key, value in model.items() if key != "preset"}


def all_presets() -> dict[str, dict[str, Any]]:
    """The presets of all families: model.preset -> settings of the `model` section."""
    return {
        name: {"family": family, **settings}
        for family in FAMILIES.names
        for name, settings in FAMILIES.get(family).presets.items()
    }


def _validated_section(name: str, given: Any) -> Node:
    """The settings of a section that is one of several kinds."""
    section = SECTIONS[name]
    kinds = section.kinds()
    kind = given.get(section.key, section.default) if isinstance(given, Mapping) else given
    if kind is None:
        raise RecipeError(f"{name}.{section.key} is missing; allowed: {', '.join(kinds)}")
    if not isinstance(given, Mapping) or kind not in kinds:
        raise RecipeError(f"{name}.{section.key} = {kind!r}; allowed: {', '.join(kinds)}")
    return kinds[kind].model_validate(given)


def _explain(item: Any, location: tuple[Any, ...], tree: Mapping[str, Any]) -> str:
    """One line for one pydantic error: the path, the value, and what is allowed."""
    path = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], tree)
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    if item["type"] == "missing":
        return f"{path} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path} = {item['input']!r}: {message}"


def _known_keys(location: tuple[Any, ...], tree: Mapping[str, Any]) -> list[str]:
    """Keys of the section at `location` of the tree."""
    node: type[BaseModel] = Recipe
    for name in map(str, location):
        field = node.model_fields.get(name)
        if field is None:
            break
        if node is Recipe and name in SECTIONS:
            section = SECTIONS[name]
            node = section.kinds()[tree[name].get(section.key, section.default)]
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        node = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), node)
    return list(node.model_fields)
