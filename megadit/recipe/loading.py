"""From YAML to a recipe and back.

`load("quickstart", ["optimizer.lr=2^-8"])` reads a shipped recipe by name or any file by path, merges what it
`extends`, applies `key.sub=value` overrides and validates. An error names the key, quotes the value and says what is
allowed.
"""

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megadit.models import FAMILIES
from megadit.node import Node
from megadit.recipe.schema import SECTIONS, Recipe
from megadit.recipe.yaml_file import RecipeError, read_yaml, read_yaml_file

RECIPE_FOLDER = Path(str(files("megadit.recipes")))


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
    stated, lines = dict(tree), []
    for name in SECTIONS.keys() & tree.keys():
        try:
            tree[name] = _validated_section(name, tree[name])
        except ValidationError as error:
            lines += _explain([item | {"loc": (name, *item["loc"])} for item in error.errors()], stated)
        except RecipeError as error:
            lines.append(str(error))
        else:
            continue
        del tree[name]
    try:
        recipe = Recipe.model_validate(tree)
        lines += _lookalikes(stated, recipe.model_dump())
    except ValidationError as error:
        left_out = [(name,) for name in stated.keys() - tree.keys()]
        # A check of the whole has nothing to say of one that lacks a section.
        items = [item for item in error.errors() if item["loc"] not in left_out and (item["loc"] or not lines)]
        lines += _explain(items, stated)
    if lines:
        raise RecipeError(f"{source}: " + "; ".join(lines))
    return recipe


def parse_text(text: str | bytes, source: str) -> Recipe:
    """Validate a whole recipe as YAML, as `dump` writes it. Raises RecipeError."""
    return parse(_mapping(read_yaml(text, source), source), source)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `parse_text(dump(r), "r") == r`."""
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
    tree = _mapping(read_yaml_file(path), str(path))
    parent = tree.pop("extends", None)
    _import_modules(tree.get("imports"), str(path))
    _apply_preset(tree)
    if parent is None:
        return tree
    is_file = Path(str(parent)).suffix in (".yaml", ".yml")
    return _merge(_read_tree(resolve(path.parent / parent if is_file else str(parent)), (*seen, path)), tree)


def _mapping(tree: Any, source: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise RecipeError(f"{source}: a recipe is a YAML mapping, not {type(tree).__name__}")
    return tree


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
    node[leaf] = read_yaml(text, f"override {override!r}")
    if key == "imports":
        _import_modules(node[leaf], f"override {override!r}")
    if key == "model.preset":
        tree["model"] |= preset_settings(tree["model"].pop("preset"))


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
    """Put the settings that `model.preset` stands for below those that the section states beside it.

    What another file stated before them, which this one extends, they replace: later wins.
    """
    model = tree.get("model")
    if isinstance(model, dict) and "preset" in model:
        own = {key: value for key, value in model.items() if key != "preset"}
        tree["model"] = preset_settings(model["preset"]) | own


def preset_settings(name: Any) -> dict[str, Any]:
    """What a preset stands for in the `model` section. Raises RecipeError for an unknown one."""
    presets = all_presets()
    if name not in presets:
        close = difflib.get_close_matches(str(name), presets, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(presets)}"
        raise RecipeError(f"unknown model.preset {name!r}; {hint}")
    return presets[name]


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


def _lookalikes(given: Any, read: Any, path: str = "") -> list[str]:
    """What pydantic takes for a number and a person would not: booleans, and text (0640) for a whole number."""
    if isinstance(given, Mapping) and isinstance(read, Mapping):
        pairs = [(f"{path}.{key}".removeprefix("."), value, read.get(key)) for key, value in given.items()]
    elif isinstance(given, list | tuple) and isinstance(read, list | tuple):
        pairs = [(path, *pair) for pair in zip(given, read, strict=False)]
    elif isinstance(given, bool) and not isinstance(read, bool) and isinstance(read, int | float):
        return [f"{path} = {given!r}: must be a number"]
    elif isinstance(given, str) and type(read) is int:
        return [f"{path} = {given!r}: must be a whole number, without zeros before it"]
    else:
        return []
    return [line for name, ours, theirs in pairs for line in _lookalikes(ours, theirs, name)]


def _explain(items: Sequence[Any], tree: Mapping[str, Any]) -> list[str]:
    """One line for each key that pydantic finds wrong: the path, the value, and what is allowed."""
    messages: dict[str, list[str]] = {}
    for item in items:
        path, message = _explain_one(item, tree)
        messages.setdefault(path, []).append(message)
    lines = []
    for path, said in messages.items():
        first, *others = dict.fromkeys(said)  # of a key that takes one of several types, each has something to say
        lines.append(path + first + "".join(f", or {other.partition(': ')[2]}" for other in others))
    return lines


def _explain_one(item: Any, tree: Mapping[str, Any]) -> tuple[str, str]:
    """The path of an error, and the rest of its line."""
    keys = _keys(item["loc"], tree, item["type"] == "missing")
    path, node = ".".join(keys), _node_at(keys[:-1], tree)
    if item["type"] == "extra_forbidden":
        known = list(node.model_fields)
        close = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {path!r}", f"; {hint}"
    if item["type"] == "missing":
        return path, " is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return path, f": {message}" if path else message
    field = node.model_fields.get(keys[-1]) if keys else None
    off = "; null turns it off" if field is not None and type(None) in get_args(field.annotation) else ""
    return path, f" = {item['input']!r}: {message}{off}"


def _keys(location: Sequence[Any], tree: Any, is_missing: bool) -> list[str]:
    """The keys of pydantic's location of an error; where several types are possible it names types there, too."""
    found: list[str] = []
    for index, part in enumerate(location):
        inside = part in tree if isinstance(tree, Mapping) else isinstance(tree, list) and isinstance(part, int)
        if inside or (is_missing and index == len(location) - 1):
            found.append(str(part))
            tree = tree[part] if inside else None
    return found


def _node_at(keys: Sequence[str], tree: Mapping[str, Any]) -> type[BaseModel]:
    """The class of the section at `keys` of the tree."""
    node: type[BaseModel] = Recipe
    for name in keys:
        field = node.model_fields.get(name)
        if field is None:
            break
        if node is Recipe and name in SECTIONS:
            section = SECTIONS[name]
            node = section.kinds()[tree[name].get(section.key, section.default)]
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        node = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), node)
    return node
