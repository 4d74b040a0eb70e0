"""Which keys of two recipes differ, and whether it matters: whether one can go on with a run of the other."""

from collections.abc import Mapping
from typing import Any

from megadit.recipe.schema import Recipe

# Keys that may change between a run and its continuation: they have no effect on the trajectory.
FREE_KEYS = (
    "engine",
    "hardware",
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


class Differences(dict[str, tuple[Any, Any]]):
    """Dotted keys whose values differ, with the value there and the value here."""

    @property
    def free(self) -> "Differences":
        """Those that may change when a run is gone on with."""
        return Differences({key: values for key, values in self.items() if is_free(key)})

    @property
    def matter(self) -> "Differences":
        """Those that make it another run."""
        return Differences({key: values for key, values in self.items() if not is_free(key)})

    def __str__(self) -> str:
        return "; ".join(f"{key}: {there!r} there, {here!r} now" for key, (there, here) in self.items())


def differences(there: Recipe, here: Recipe) -> Differences:
    """How the recipe `here` differs from `there`, such as that of a run that has begun."""
    flat_there, flat_here = _flatten(there.model_dump(mode="json")), _flatten(here.model_dump(mode="json"))
    keys = sorted(flat_there.keys() | flat_here.keys())
    pairs = {key: (flat_there.get(key), flat_here.get(key)) for key in keys}
    return Differences({key: (old, new) for key, (old, new) in pairs.items() if old != new})


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
