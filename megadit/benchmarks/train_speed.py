"""`megadit bench train`: how fast a recipe trains on synthetic data, in several settings."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

from megadit.exit_codes import DONE
from megadit.launcher.environment import Ranks
from megadit.launcher.join import launch_or_join
from megadit.recipe import Recipe, load, one_stage

if TYPE_CHECKING:
    from megadit.benchmarks.findings import Cell, Table
    from megadit.benchmarks.synthetic import Measured, Setting


def bench_train(
    source: str,
    overrides: Sequence[str],
    micro_batches: str | None,
    checkpointing: str | None,
    num_steps: int,
    text_tokens: int | None,
    say: Callable[["Table"], object],
) -> int:
    """Measure the recipe `source` with `overrides` on its engine and ranks; on the first, `say` gets the table.

    `micro_batches` and `checkpointing` are lists with commas between, by default what the recipe says. Raises
    ValueError for what is no such list.
    """
    recipe = one_stage(load(source, overrides), "megadit bench train")

    def measure(ranks: Ranks) -> int:
        from megadit.benchmarks import synthetic

        settings = parse_settings(recipe, micro_batches, checkpointing, ranks.world_size)
        measured = synthetic.bench(recipe, settings, num_steps, text_tokens)
        if ranks.rank == 0:
            say(table_of(recipe, measured, ranks.world_size))
        return DONE

    return launch_or_join(recipe.engine.num_ranks, measure)


def parse_settings(
    recipe: Recipe, micro_batches: str | None, checkpointing: str | None, world_size: int
) -> list["Setting"]:
    """Every micro-batch size with every level of activation checkpointing, from lists such as `8,16` and `none,full`.

    Raises ValueError for a micro-batch that is not a whole number above 0; the recipe's schema judges the levels.
    """
    from megadit.benchmarks.synthetic import Setting

    default = recipe.training.micro_batch_size or max(1, recipe.training.batch_size // world_size)
    sizes = (micro_batches or str(default)).split(",")
    if wrong := [size for size in sizes if not (size.isdecimal() and int(size))]:
        raise ValueError(f"--micro-batch takes whole numbers with commas between, such as 8,16, not {wrong[0]!r}")
    levels = (checkpointing or str(recipe.engine.activation_checkpointing)).split(",")
    parsed = [int(level) if level.isdecimal() else level for level in levels]
    return [Setting(int(size), level) for level, size in product(parsed, sizes)]


def table_of(recipe: Recipe, measured: Sequence["Measured"], world_size: int) -> "Table":
    """Rates are over all ranks, TFLOP/s and memory of one; the split of a step is in shares of its time."""
    from megadit.benchmarks.findings import Table

    speeds = [item.costs.images_per_second for item in measured if item.costs is not None]
    return Table(
        title=f"{recipe.name}: {recipe.model.family} of width {recipe.model.width} and depth {recipe.model.depth}, "
        f"{recipe.training.precision}, engine {recipe.engine.kind} on {world_size} rank(s), "
        f"blocks {'' if recipe.engine.compile else 'not '}compiled; synthetic data",
        baseline="images/s of the first setting that fits",
        rows=[_row(item, speeds[0] if speeds else 0.0) for item in measured],
    )


def _row(item: "Measured", baseline: float) -> dict[str, "Cell"]:
    costs = item.costs
    asked: dict[str, Cell] = {
        "micro-batch": item.setting.micro_batch_size,
        "checkpointing": str(item.setting.activation_checkpointing),
    }
    if costs is None:
        return asked | {"images/s": "out of memory"}
    step = sum(costs.seconds.values())
    return asked | {
        "images/s": costs.images_per_second,
        "ratio": costs.images_per_second / baseline,
        "tokens/s": costs.tokens_per_second,
        "TFLOP/s": costs.flops_per_second / 1e12,
        "MFU": costs.mfu,
        "peak GiB": costs.peak_bytes / 2**30,
        "ms/step": step * 1000,
        **{phase: costs.seconds[phase] / step for phase in ("forward", "backward", "optimizer")},
    }
