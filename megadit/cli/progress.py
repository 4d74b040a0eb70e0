"""The bars of commands that take long."""

from collections.abc import Iterator
from contextlib import contextmanager

from megadit.data.bars import Advance


@contextmanager
def progress_bar(description: str) -> Iterator[Advance]:
    """A bar on the terminal; where standard error is none, nothing is drawn."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
