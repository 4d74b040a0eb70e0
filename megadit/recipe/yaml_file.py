"""YAML as recipes are written in it: 1.2's numbers and booleans, and no key twice.

PyYAML reads YAML 1.1, where `no` is a boolean, 0640 is 416 and 1:20 is 80, and takes the last of a key that is there
twice. Here `true` and `false` alone are booleans, and what is no plain number stays text, which the schema refuses.
"""

import re
from pathlib import Path
from typing import Any

import yaml

_RESOLVED_ANEW = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


class RecipeError(ValueError):
    """A recipe that cannot be used: what was wrong, where, and what is allowed."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with other scalars, which refuses a key that a mapping has already."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _RESOLVED_ANEW]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in lines:
                raise RecipeError(f"the key {key!r} is there twice, in lines {lines[key]} and {line}; keep one")
            lines[key] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(text: str | bytes, source: str) -> Any:
    """What a YAML text says. `source` says in errors where it comes from. Raises RecipeError."""
    try:
        return yaml.load(text, _Loader)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from None


def read_yaml_file(path: Path) -> Any:
    """What a YAML file says. Raises RecipeError for one that is not YAML in UTF-8."""
    try:
        return read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
