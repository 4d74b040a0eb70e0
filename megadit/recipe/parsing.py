"""From a tree, as YAML has it, to a recipe: the sections that are of several kinds, and errors that a person can use.

An error names the key, quotes the value and says what is allowed.
"""

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megadit.node import Node
from megadit.recipe.schema import SECTIONS, Recipe
from megadit.recipe.yaml_file import RecipeError


def parse_whole(tree: Mapping[str, Any], source: str) -> Recipe:
    """Validate a plain tree, as read from YAML; the modules that it imports are imported. Its stages stay as they are.

    Raises RecipeError.
    """
    tree = dict(tree)
    import_modules(tree.get("imports"), source)
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


def import_modules(names: Any, source: str) -> None:
    """Import what adds families, objectives and optimizers. What is no list of names is an error of the schema."""
    for name in names if isinstance(names, list | tuple) else ():
        try:
            importlib.import_module(str(name))
        except ImportError as error:
            raise RecipeError(
                f"{source}: imports: cannot import {name!r}: {error}; a module must be installed or on PYTHONPATH"
            ) from None


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


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
