"""The judged images of a folder on disk: append-only lines of JSON, a file for each rank.

A line is an image: {"prompt", "image", "sha256" of the image, "judge", "correct", "reason", "details"}. Lines of
another judge (networks or thresholds) or of another picture under the same name do not count, so that a run which was
killed goes on where it stopped, on any number of ranks.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megadit.eval.units import Unit
from megadit.training.ranks import rank, world_size

Row = dict[str, Any]


class Append(Protocol):
    """Adds a row for good: it is on disk when this returns."""

    def __call__(self, row: Row) -> None: ...


class Rows:
    """The rows of one judge for the units of a folder; `folder` is theirs alone."""

    def __init__(self, folder: Path, judge: str, units: Sequence[Unit]) -> None:
        self._folder, self._judge, self._units = folder, judge, units

    def read(self) -> list[Row]:
        """The rows that are there, in the order of the units."""
        digests = {(unit.prompt, unit.image): unit.sha256 for unit in self._units}
        found: dict[tuple[int, int], Row] = {}
        for path in sorted(self._folder.glob("rank-*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):  # of a process that was killed while it wrote
                    continue
                row = json.loads(line)
                place = (row["prompt"], row["image"])
                if row["judge"] == self._judge and digests.get(place) == row["sha256"]:
                    found[place] = row
        return [found[place] for place in digests if place in found]

    def missing(self) -> list[Unit]:
        """The units without a row."""
        done = {(row["prompt"], row["image"]) for row in self.read()}
        return [unit for unit in self._units if (unit.prompt, unit.image) not in done]

    @contextmanager
    def writer(self) -> Iterator[Append]:
        """Append to this rank's file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{rank()}-of-{world_size()}.jsonl"
        with path.open("a+b", buffering=0) as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

            def append(row: Row) -> None:
                file.write(json.dumps(row | {"judge": self._judge}).encode("ascii") + b"\n")
                os.fsync(file.fileno())

            yield append
