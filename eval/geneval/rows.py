"""The judged images of a folder on disk: a journal.

A line is an image: {"prompt", "image", "sha256" of the image, "judge", "correct", "reason", "details"}. Lines of
another judge (networks or thresholds) or of another picture under the same name do not count, so that a run which was
killed goes on where it stopped, on any number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megadit import journal
from megadit.distributed import Topology
from megadit.eval.units import Unit

Row = dict[str, Any]


class Rows:
    """The rows of one judge for the units of a folder; `folder` is theirs alone."""

    def __init__(self, folder: Path, judge: str, units: Sequence[Unit]) -> None:
        self._folder, self._judge, self._units = folder, judge, units

    def read(self) -> list[Row]:
        """The rows that are there, in the order of the units."""
        digests = {(unit.prompt, unit.image): unit.sha256 for unit in self._units}
        found: dict[tuple[int, int], Row] = {}
        for row in journal.read_lines(self._folder):
            place = (row["prompt"], row["image"])
            if row["judge"] == self._judge and digests.get(place) == row["sha256"]:
                found[place] = row
        return [found[place] for place in digests if place in found]

    def missing(self) -> list[Unit]:
        """The units without a row."""
        done = {(row["prompt"], row["image"]) for row in self.read()}
        return [unit for unit in self._units if (unit.prompt, unit.image) not in done]

    @contextmanager
    def writer(self, topology: Topology) -> Iterator[Callable[[Row], None]]:
        """What appends a row to this rank's file: it is on disk when that returns."""
        with journal.appending(self._folder, topology.rank, topology.size) as append:
            yield lambda row: append(journal.to_lines(row | {"judge": self._judge}))
