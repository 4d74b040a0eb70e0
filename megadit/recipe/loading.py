"""From YAML to a recipe and back.

`load("quickstart", ["optimizer.lr=2^-8"])` reads a shipped recipe by name or any file by path, merges what it
`extends`, applies `key.sub=value` overrides and validates. An error names the key, quotes the value and says what is
allowed.
"""

import difflib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megadit.recipe.models import PRESETS
from megadit.recipe.schema import Recipe

RECIPE_FOLDER = Path(str(files("megadit.recipes")))


KINDS = {"model": "family", "objective": "kind"}  # sections that are one of several kinds, and the key that says which


class RecipeError(ValueError):
    """A recipe that cannot be used: what was wrong, where, and what is allowed."""


# Keys that may change between a run and its continuation: they have no effect on the trajectory.
FREE_KEYS = (
    "engine",
    "provenance",
    "checkpoints",
    "eval",
    "data.url",
    "data.validation_url",
    "data.num_workers",
    "data.memory_mb",
    "data.cache_folder",
    "data.cache_gb",
    "data.client",
    "data.max_corrupt_share",
    "encoders.sharded",
    "training.micro_batch_size",
    "training.log_every_steps",
    "training.max_skipped_steps",
    "training.stall_seconds",
)


def load(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load the recipe `source` (a shipped name or a path) with `key.sub=value` overrides.

    Raises RecipeError for everything that a user can get wrong.
    """
    tree = _read_tree(resolve(source), seen=())
    for override in overrides:
        _apply_override(tree, override)
    _apply_preset(tree)
    return parse(tree, str(source))


def parse(tree: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a plain tree, as read from YAML."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item, tree) for item in error.errors()]
        raise RecipeError(f"{source}: " + "; ".join(lines)) from None


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


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, mapped to (old, new)."""
    flat_old, flat_new = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = sorted(flat_old.keys() | flat_new.keys())
    return {k: (flat_old.get(k), flat_new.get(k)) for k in keys if flat_old.get(k) != flat_new.get(k)}


def is_free(key: str) -> bool:
    """Whether a dotted key may change when a run is resumed."""
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


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


def _apply_preset(tree: dict[str, Any]) -> None:
    """Put the settings that `model.preset` stands for below those that the section states itself."""
    model = tree.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    name = model.pop("preset")
    if name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(PRESETS)}"
        raise RecipeError(f"unknown model.preset {name!r}; {hint}")
    tree["model"] = PRESETS[name] | model


def _explain(item: Any, tree: Mapping[str, Any]) -> str:
    """One line for one pydantic error: the path, the value, and what is allowed."""
    keys = [str(part) for part in item["loc"]]
    if len(keys) > 1 and keys[0] in KINDS:
        del keys[1]  # pydantic puts the kind of the section into the path
    path = ".".join(keys)
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        key, allowed = KINDS[path], ", ".join(_kinds(path))
        given = tree[path].get(key) if isinstance(tree[path], Mapping) else tree[path]
        return (
            f"{path}.{key} is missing; allowed: {allowed}"
            if given is None
            else (f"{path}.{key} = {given!r}; allowed: {allowed}")
        )
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    if item["type"] == "missing":
        return f"{path} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path} = {item['input']!r}: {message}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Keys of the section at `location` of the tree."""
    node: type[BaseModel] = Recipe
    parts = list(location)
    while parts:
        name = str(parts.pop(0))
        if name in KINDS and node is Recipe:
            node = _kinds(name)[parts.pop(0)]
            continue
        field = node.model_fields.get(name)
        if field is None:
            break
        candidates = [field.annotation, *get_args(field.annotation)]
        node = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), node)
    return list(node.model_fields)


def _kinds(section: str) -> dict[str, type[BaseModel]]:
    """The classes of a section that has kinds, by the value of its key."""
    classes = get_args(Recipe.model_fields[section].annotation)
    return {node.model_fields[KINDS[section]].default: node for node in classes}
