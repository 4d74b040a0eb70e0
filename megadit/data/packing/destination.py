"""Where a pack goes: whose it is while the manifests are not there yet, and what killed ranks left in it.

<destination>/pack.json says what is being packed, and is written before the first shard. Without it, a pack with other
settings would go on beside the shards of one that was broken off: its manifest would not name them, but a pattern such
as shard-*.tar would find them.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from megadit.data.packing.plan import TRAIN, VALIDATION
from megadit.data.packing.settings import PackError
from megadit.data.storage import MissingError, Store

PLAN_NAME = "pack.json"
NAMES_SHOWN, LONGEST_SHOWN = 4, 24  # of what differs: names, characters of a value
TEMPORARY = re.compile(r"(.*/)?\.([^/]+)\.\w{8}")  # what a FileStore calls a file that it is writing


def claim(store: Store, splits: Iterable[Store], asked: Mapping[str, Any]) -> None:
    """Make `store` the destination of the pack that is asked for, or go on with it; JSON values by name.

    Raises PackError where something else was begun, or where a split has shards of nobody knows what, and StorageError.
    Nothing there is changed then.
    """
    if _begun(store) == asked:
        return
    there = [split.url(name) for split in splits for name in split.list() if _is_of_a_pack(name)]
    if there and (begun := _begun(store)) != asked:  # again: another rank of this pack may have begun meanwhile
        if begun is None:
            raise PackError(
                f"{len(there)} files of a pack are there already ({there[0]}), and no {store.url(PLAN_NAME)} says of "
                "which; choose another destination, or delete them"
            )
        raise PackError(
            f"{store.url()} has part of another pack, which was broken off ({_differences(begun, asked)}); run that "
            f"one to its end, choose another destination, or delete {PLAN_NAME}, {TRAIN} and {VALIDATION} there"
        )
    if not there:
        store.put(PLAN_NAME, json.dumps(asked, indent=1, sort_keys=True).encode())


def remove_temporaries(split: Store, written: Collection[str]) -> None:
    """Delete what ranks that were killed while they wrote the files `written` left beside them. Raises StorageError.

    To be called when all of these are whole, so that nobody is writing any.
    """
    for name in list(split.list()):
        if (match := TEMPORARY.fullmatch(name)) and f"{match[1] or ''}{match[2]}" in written:
            split.delete(name)


def _begun(store: Store) -> dict[str, Any] | None:
    try:
        text = store.get(PLAN_NAME)
    except MissingError:
        return None
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        url = store.url(PLAN_NAME)
        raise PackError(f"{url} is not that of a pack ({error}); delete it, with all beside it") from None


def _is_of_a_pack(name: str) -> bool:
    """Of one of ours, or what readers would take for one."""
    return name.endswith(".tar") or name.startswith(("shards/", "index/"))


def _differences(begun: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    names = sorted(name for name in begun.keys() | asked.keys() if begun.get(name) != asked.get(name))
    shown = [f"{name} is {_short(begun.get(name))} there, {_short(asked.get(name))} here" for name in names]
    return "; ".join(shown[:NAMES_SHOWN] + ["..."] * (len(shown) > NAMES_SHOWN))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
