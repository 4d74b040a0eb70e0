"""From YAML to a recipe and back.

`load("quickstart", ["optimizer.lr=2^-8"])` reads a shipped recipe by name or any file by path, merges what it
`extends`, applies `key.sub=value` overrides and validates. An error names the key, quotes the value and says what is
allowed.
"""

import difflib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from megadit.models import FAMILIES
from megadit.recipe.parsing import import_modules, merge, parse_whole
from megadit.recipe.schema import Recipe
from megadit.recipe.stages import plan
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
    """Validate a plain tree, as read from YAML, and each of its stages; the modules that it imports are imported."""
    recipe = parse_whole(tree, source)
    plan(recipe, source)
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
    import_modules(tree.get("imports"), str(path))
    _apply_preset(tree)
    if parent is None:
        return tree
    is_file = Path(str(parent)).suffix in (".yaml", ".yml")
    return merge(_read_tree(resolve(path.parent / parent if is_file else str(parent)), (*seen, path)), tree)


def _mapping(tree: Any, source: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise RecipeError(f"{source}: a recipe is a YAML mapping, not {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r} is not of the form key.sub=value")
    *parents, leaf = key.split(".")
    node: Any = tree
    for depth, parent in enumerate(parents):
        where = ".".join(parents[:depth])
        node = node[_place(parent, node, where, override)] if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    value = read_yaml(text, f"override {override!r}")
    node[_place(leaf, node, ".".join(parents), override) if isinstance(node, list) else leaf] = value
    if key == "imports":
        import_modules(value, f"override {override!r}")
    if key == "model.preset":
        tree["model"] |= preset_settings(tree["model"].pop("preset"))


def _place(key: str, items: list[Any], where: str, override: str) -> int:
    """The place in a list that a part of a dotted key names, counted from 0."""
    if not key.isdecimal() or int(key) >= len(items):
        raise RecipeError(f"override {override!r}: {where} is a list of {len(items)}, counted from 0; not {key!r}")
    return int(key)


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
