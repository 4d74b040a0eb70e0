"""Checkpoint speed on this machine: bandwidth beside dd's, and how long training stands still.

`python -m megadit.training.bench_checkpoint [RECIPE] [KEY=VALUE ...] [--folder .] [--rounds 5]`. One process saves and
loads the state of the recipe's model. In each round dd copies the data file that was just written (conv=fsync) into the
same folder, and reads the one that was loaded: the same bytes, since disks and hypervisors make short work of zeros.
Files are dropped from the page cache before they are read. Ratios are medians over the rounds.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megadit import engines, recipe as recipes, timing
from megadit.distributed import ALONE
from megadit.recipe import Recipe
from megadit.training import checkpoint
from megadit.training.checkpoint import Saver
from megadit.training.ema import Averages

DEFAULTS = ("model.width=640", "engine.kind=single", "engine.num_ranks=1")  # 0.9 GB with the quickstart
BLOCK_BYTES = 4 * 2**20
DATA = "rank-0.bin"  # all but the header and the index


def measure(recipe: Recipe, folder: Path, num_rounds: int) -> str:
    """The table that the command prints."""
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


def _table(rows: dict[str, list[float]], num_bytes: int) -> str:
    lines = [f"{num_bytes / 1e9:.2f} GB, median of {len(rows['save'])} rounds", f"{'':<18}{'s':>8}{'GB/s':>8}"]
    for row in ("save", "dd write", "async stall", "load", "dd read"):
        seconds = statistics.median(rows[row])
        lines.append(f"{row:<18}{seconds:>8.2f}{num_bytes / 1e9 / seconds:>8.2f}")
    for name, ours, theirs in (
        ("bandwidth of a save / dd's", "dd write", "save"),
        ("bandwidth of a load, verified / dd's", "dd read", "load"),
        ("stall of an asynchronous save / a synchronous one", "async stall", "save"),
    ):
        ratios = [a / b for a, b in zip(rows[ours], rows[theirs], strict=True)]
        lines.append(f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return "\n".join(lines)


def _path(folder: Path, images_seen: int) -> Path:
    return folder / "checkpoints" / f"images-{images_seen:010d}"


def _dd(source: Path, target: Path, *options: str) -> None:
    command = ["dd", f"if={source}", f"of={target}", f"bs={BLOCK_BYTES}", *options]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def _drop_from_cache(files: Iterable[Path]) -> None:
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m megadit.training.bench_checkpoint", description=__doc__)
    parser.add_argument("recipe", nargs="?", default="quickstart", help="name or path of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"after {' '.join(DEFAULTS)}")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    def table() -> str:
        recipe = recipes.load(args.recipe, [*DEFAULTS, *args.overrides])
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            return measure(recipe, Path(folder), args.rounds)

    return timing.print_table(table)


if __name__ == "__main__":
    sys.exit(main())
