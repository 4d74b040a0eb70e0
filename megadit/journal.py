"""A journal: finished work as records in a folder, appended by each rank to a file of its own.

A record is there when it is whole. A process that is killed leaves half a one at most: readers pass over it, and
whoever goes on with the file takes it away.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

Append = Callable[[bytes], None]
"""Adds whole records: they are on disk when it returns."""


@contextmanager
def appending(folder: Path, rank: int, world_size: int, dtype: np.dtype[np.void] | None = None) -> Iterator[Append]:
    """Append to the file of one rank: records of `dtype`, or lines of JSON (`to_lines`) without."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank}-of-{world_size}.{'jsonl' if dtype is None else 'bin'}"
    with path.open("a+b", buffering=0) as file:
        if dtype is None:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
        else:
            whole = file.tell() // dtype.itemsize * dtype.itemsize
        file.truncate(whole)  # half a record would spoil the next one

        def append(records: bytes) -> None:
            file.write(records)
            os.fsync(file.fileno())

        yield append


def to_lines(*records: Mapping[str, Any]) -> bytes:
    """Records as lines of JSON."""
    return "".join(f"{json.dumps(record)}\n" for record in records).encode("ascii")


def read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of all ranks that are lines of JSON, by rank and in their order."""
    for path in sorted(folder.glob("rank-*.jsonl")):
        yield from read_file(path)


def read_file(path: Path) -> list[dict[str, Any]]:
    """The lines of one file; half a line at its end, cut short or still being written, is left out."""
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def read_arrays(folder: Path, dtype: np.dtype[np.void]) -> Iterator["np.memmap[tuple[int], np.dtype[np.void]]"]:
    """The records of `dtype`, a mapped array [N] for each rank that has some."""
    for path in sorted(folder.glob("rank-*.bin")):
        if num_records := path.stat().st_size // dtype.itemsize:
            yield np.memmap(path, dtype=dtype, mode="r", shape=(num_records,))
