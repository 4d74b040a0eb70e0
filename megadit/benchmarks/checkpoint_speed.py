"""`megadit bench checkpoint`: bandwidth beside dd's, and how long training stands still.

One process saves and loads the state of the recipe's model. In each round dd copies the data file that was just written
(conv=fsync) into the same folder, and reads the one that was loaded: the same bytes, since disks and hypervisors make
short work of zeros. Files are dropped from the page cache before they are read. Ratios are medians over the rounds.
"""

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megadit import engines, recipe as recipes
from megadit.benchmarks.findings import Cell, Table
from megadit.distributed import ALONE
from megadit.recipe import Recipe
from megadit.training import checkpoint
from megadit.training.checkpoint import Saver
from megadit.training.ema import Averages

DEFAULTS = ("model.width=640", "engine.kind=single", "engine.num_ranks=1")  # 0.9 GB with the quickstart
BLOCK_BYTES = 4 * 2**20
DATA = "rank-0.bin"  # all but the header and the index


def bench_checkpoint(source: str, overrides: Sequence[str], folder: Path, num_rounds: int) -> Table:
    """`folder` is on the disk to measure; `overrides` come after DEFAULTS."""
    recipe = recipes.load(source, [*DEFAULTS, *overrides])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return _measure(recipe, Path(scratch), num_rounds)


def _measure(recipe: Recipe, folder: Path, num_rounds: int) -> Table:
    engine = engines.build(recipe, ALONE)
    averages = Averages(engine.shards, recipe.training.ema_rates, recipe.training.ema_power_stds)
    rows: dict[str, list[float]] = {}

    def time_of(row: str, action: Callable[..., object], *arguments: object) -> None:
        start = time.perf_counter()
        action(*arguments)
        rows.setdefault(row, []).append(time.perf_counter() - start)

    def saver(asynchronous: bool) -> Saver:
        settings = recipe.checkpoints.model_copy(update={"asynchronous": asynchronous, "keep": 10**6})
        return Saver(folder, recipe.model_copy(update={"checkpoints": settings}), engine, averages)

    with saver(asynchronous=False) as synchronous, saver(asynchronous=True) as asynchronous:
        asynchronous.save(1, 1)  # makes its buffers
        asynchronous.wait()
        for number in range(2, 2 * num_rounds + 2, 2):
            time_of("save", synchronous.save, number, number)
            path = _path(folder, number)
            num_bytes = checkpoint.read_header(path).num_bytes
            time_of("dd write", _dd, path / DATA, folder / "dd", "conv=fsync")
            (folder / "dd").unlink()
            shutil.rmtree(path)  # here and not by the saver: it is no part of writing
            time_of("async stall", asynchronous.save, number + 1, number)
            asynchronous.wait()
            path = _path(folder, number + 1)
            steps: list[Any] = [
                ("load", checkpoint.load, path, engine, averages),
                ("dd read", _dd, path / DATA, Path("/dev/null")),
            ]
            for step in steps if number % 4 else reversed(steps):  # the second finds memory that was just freed
                _drop_from_cache(path.iterdir())
                time_of(*step)
            shutil.rmtree(path)
    return _table(rows, num_bytes)


def _table(seconds: dict[str, list[float]], num_bytes: int) -> Table:
    def row(what: str, ours: str, theirs: str) -> dict[str, Cell]:
        ratios = [one / other for one, other in zip(seconds[ours], seconds[theirs], strict=True)]
        found: dict[str, Cell] = {"what": what, "ratio": statistics.median(ratios)}
        for name, action in (("ours", what), ("theirs", ours if theirs == what else theirs)):
            found[f"s, {name}"] = statistics.median(seconds[action])
        return found | {"least": min(ratios), "most": max(ratios)}

    return Table(
        title=f"{num_bytes / 1e9:.2f} GB, median of {len(seconds['save'])} rounds",
        baseline="bandwidth of dd, for a save and a verified load; time of a synchronous save, for a stall",
        rows=[
            row("save", "dd write", "save"),
            row("load", "dd read", "load"),
            row("async stall", "async stall", "save"),
        ],
    )


def _path(folder: Path, images_seen: int) -> Path:
    return folder / "checkpoints" / f"images-{images_seen:010d}"


def _dd(source: Path, target: Path, *options: str) -> None:
    command = ["dd", f"if={source}", f"of={target}", f"bs={BLOCK_BYTES}", *options]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def _drop_from_cache(files: Iterable[Path]) -> None:
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
