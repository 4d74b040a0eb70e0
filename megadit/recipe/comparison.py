"""Which keys of two recipes differ, and whether they may: when a run is gone on with, and from stage to stage."""

from collections.abc import Mapping
from typing import Any, get_args

from megadit.node import UNMARKED, Mark, Node
from megadit.recipe.schema import Recipe


class Differences(dict[str, tuple[Any, Any]]):
    """Dotted keys whose values differ, with the value there and the value here, and the mark of each."""

    def __init__(self, pairs: Mapping[str, tuple[Any, Any]], marks: Mapping[str, Mark]) -> None:
        super().__init__(pairs)
        self.marks = marks

    @property
    def free(self) -> "Differences":
        """Those that may change when a run is gone on with."""
        return Differences({key: pair for key, pair in self.items() if self.marks[key].at_resume}, self.marks)

    @property
    def matter(self) -> "Differences":
        """Those that make it another run."""
        return Differences({key: pair for key, pair in self.items() if not self.marks[key].at_resume}, self.marks)

    def __str__(self) -> str:
        return "; ".join(f"{key}: {there!r} there, {here!r} now" for key, (there, here) in self.items())


def differences(there: Recipe, here: Recipe) -> Differences:
    """How the recipe `here` differs from `there`, such as that of a run that has begun."""
    flat_there, flat_here = _flatten(there.model_dump(mode="json")), _flatten(here.model_dump(mode="json"))
    keys = sorted(flat_there.keys() | flat_here.keys())
    pairs = {key: (flat_there.get(key), flat_here.get(key)) for key in keys}
    changed = {key: (old, new) for key, (old, new) in pairs.items() if old != new}
    return Differences(changed, {key: mark_of(key, here) or mark_of(key, there) or UNMARKED for key in changed})


def mark_of(key: str, recipe: Recipe) -> Mark | None:
    """Whether a dotted key of the recipe may change: by its own mark, or else that of its section.

    None where there is no such key; a key without either is UNMARKED.
    """
    node: type[Node] | None = Recipe
    value: Any = recipe
    found = UNMARKED
    for part in key.split("."):
        field = node.model_fields.get(part) if node is not None else None
        if field is None:
            return found if node is None else None  # inside of a value that is no section, such as provenance
        found = next((item for item in field.metadata if isinstance(item, Mark)), found)
        value = getattr(value, part, None)
        node = type(value) if isinstance(value, Node) else _section(field.annotation)
    return found


def _section(annotation: Any) -> type[Node] | None:
    """The class of a section that is not there, by the annotation of its field."""
    candidates = [annotation, *get_args(annotation)]
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Node)), None)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
