"""Writing a file so that it is there whole, on disk, or not at all."""

import os
from pathlib import Path

PARTIAL = ".partial-"  # begins the name of a file that is being written


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is either there, whole and synced, or not there; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))
