"""Checkpoint speed on this machine: bandwidth beside dd's, and how long training stands still.

`python -m megadit.training.bench_checkpoint [RECIPE] [KEY=VALUE ...] [--folder .] [--rounds 5]`. One process saves and
loads the state of the recipe's model. In each round dd writes (conv=fsync) and reads a file of the same size in the
same folder; files are dropped from the page cache before they are read. Ratios are medians over the rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from megadit import engines, recipe as recipes
from megadit.engines.base import Engine
from megadit.recipe import Recipe
from megadit.training import checkpoint
from megadit.training.checkpoint import Saver
from megadit.training.ema import Averages

DEFAULTS = ("model.width=640", "engine.kind=single", "engine.num_ranks=1")  # 0.9 GB with the quickstart
BLOCK = 4 * 2**20


def measure(recipe: Recipe, folder: Path, num_rounds: int) -> str:
    """The table that the command prints."""
    engine = engines.build(recipe)
    averages = Averages(engine.shards, recipe.training.ema_rates)
    rows: dict[str, list[float]] = {}

    def time_of(row: str, action: Callable[..., object], *arguments: object) -> None:
        start = time.perf_counter()
        action(*arguments)
        rows.setdefault(row, []).append(time.perf_counter() - start)

    def saver(asynchronous: bool) -> Saver:
        settings = recipe.checkpoints.model_copy(update={"asynchronous": asynchronous, "keep": 1})
        return Saver(folder, recipe.model_copy(update={"checkpoints": settings}), engine, averages)

    with saver(asynchronous=False) as synchronous, saver(asynchronous=True) as asynchronous:
        asynchronous.save(1, 1)  # makes its buffers
        asynchronous.wait()
        for number in range(2, 2 * num_rounds + 2, 2):
            time_of("save", synchronous.save, number, number)
            path = folder / "checkpoints" / f"images-{number:010d}"
            num_bytes = checkpoint.read_header(path).num_bytes
            time_of("dd write", _dd_write, folder / "dd", num_bytes)
            time_of("async stall", asynchronous.save, number + 1, number)
            asynchronous.wait()
            path = folder / "checkpoints" / f"images-{number + 1:010d}"
            _drop_from_cache(path.iterdir())
            time_of("verify and load", _verify_and_load, path, engine, averages)
            _drop_from_cache(path.iterdir())
            time_of("load", checkpoint.load, path, engine, averages)
            _drop_from_cache([folder / "dd"])
            time_of("dd read", _dd_read, folder / "dd")
            (folder / "dd").unlink()
    return _table(rows, num_bytes)


def _verify_and_load(path: Path, engine: Engine, averages: Averages) -> None:
    assert checkpoint.find_damage(path) is None
    checkpoint.load(path, engine, averages)


def _table(rows: dict[str, list[float]], num_bytes: int) -> str:
    lines = [f"{num_bytes / 1e9:.2f} GB, median of {len(rows['save'])} rounds", f"{'':<18}{'s':>8}{'GB/s':>8}"]
    for row in ("save", "dd write", "async stall", "verify and load", "load", "dd read"):
        seconds = statistics.median(rows[row])
        lines.append(f"{row:<18}{seconds:>8.2f}{num_bytes / 1e9 / seconds:>8.2f}")
    for name, ours, theirs in (
        ("bandwidth of a save / dd's", "dd write", "save"),
        ("bandwidth of a verified load / dd's", "dd read", "verify and load"),
        ("bandwidth of a load / dd's", "dd read", "load"),
        ("stall of an asynchronous save / a synchronous one", "async stall", "save"),
    ):
        ratios = [a / b for a, b in zip(rows[ours], rows[theirs], strict=True)]
        lines.append(f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return "\n".join(lines)


def _dd_write(file: Path, num_bytes: int) -> None:
    arguments = [f"of={file}", f"bs={BLOCK}", f"count={num_bytes}", "iflag=count_bytes,fullblock", "conv=fsync"]
    subprocess.run(["dd", "if=/dev/zero", *arguments], check=True, stderr=subprocess.DEVNULL)


def _dd_read(file: Path) -> None:
    subprocess.run(["dd", f"if={file}", "of=/dev/null", f"bs={BLOCK}"], check=True, stderr=subprocess.DEVNULL)


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
    try:
        recipe = recipes.load(args.recipe, [*DEFAULTS, *args.overrides])
    except ValueError as error:
        sys.stderr.write(f"megadit: error: {error}\n")
        return 1
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sys.stdout.write(measure(recipe, Path(folder), args.rounds) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
