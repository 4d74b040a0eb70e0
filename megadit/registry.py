"""Named entries of one kind: the model families, objectives and optimizers that recipes choose from."""

import difflib
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name, in the order in which they were added. `what` says in errors what they are."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> Entry:
        """Add an entry and return it. Raises ValueError where another one has the name."""
        if self._entries.setdefault(name, entry) is not entry:
            raise ValueError(f"there is a {self._what} {name!r} already; give the new one another name")
        return entry

    def get(self, name: str) -> Entry:
        """The entry of that name. Raises ValueError that names the nearest, or all that there are."""
        if name not in self._entries:
            close = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(self._entries)}"
            raise ValueError(f"unknown {self._what} {name!r}; {hint}")
        return self._entries[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)
