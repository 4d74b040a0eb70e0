"""Writing a file so that it is there whole, on disk, or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PARTIAL = ".partial-"  # begins the name of a file that is being written


@contextmanager
def writing(path: Path, shared: bool = False, synced: bool = True) -> Iterator[IO[bytes]]:
    """A file to write into, which is at `path` when the body ends without an error; its folder is made where missing.

    shared: several processes may write `path` at one time. Each has a name of its own then, .NAME.xxxxxxxx, which one
    that is killed leaves behind; other left-overs are written over. synced: False for what may go with the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if shared:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        partial = Path(name)
        os.fchmod(descriptor, 0o644)
    else:
        partial = path.with_name(f"{PARTIAL}{path.name}")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            if synced:
                os.fsync(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is either there, whole and synced, or not there; its folder is made where it is missing."""
    with writing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))
