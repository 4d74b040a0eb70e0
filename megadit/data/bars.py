"""How work that takes long says how far it is: a bar for each part of it, which the command line draws."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int, int], None]  # (done, total); may be called from several threads
Bars = Callable[[str], AbstractContextManager[Advance]]  # a bar, by what it says is being done


@contextmanager
def no_bars(description: str) -> Iterator[Advance]:
    """Draws nothing."""
    yield lambda done, total: None


class Tally:
    """Adds up what several threads have done of `total`, and says so."""

    def __init__(self, advance: Advance, total: int) -> None:
        self._advance, self._total = advance, total
        self._done, self._lock = 0, threading.Lock()

    def add(self, amount: int) -> None:
        with self._lock:
            self._done += amount
            self._advance(self._done, self._total)
