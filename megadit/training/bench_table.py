"""What `megadit bench` is asked for and what it prints."""

from collections.abc import Sequence
from itertools import product

import torch

from megadit.distributed import ALONE
from megadit.planning.ceilings import device_name
from megadit.recipe import Recipe
from megadit.training.synthetic import Measured, Setting

HEADINGS = (
    "micro-batch",
    "checkpointing",
    "images/s",
    "tokens/s",
    "TFLOP/s",
    "MFU",
    "peak GiB",
    "ms/step",
    "forward",
    "backward",
    "optimizer",
)


def parse_settings(
    recipe: Recipe, micro_batches: str | None, checkpointing: str | None, world_size: int
) -> list[Setting]:
    """Every micro-batch size with every level of activation checkpointing, from lists such as `8,16` and `none,full`.

    Raises ValueError for a micro-batch that is not a whole number above 0; the recipe's schema judges the levels.
    """
    default = recipe.training.micro_batch_size or max(1, recipe.training.batch_size // world_size)
    sizes = (micro_batches or str(default)).split(",")
    if wrong := [size for size in sizes if not (size.isdecimal() and int(size))]:
        raise ValueError(f"--micro-batch takes whole numbers with commas between, such as 8,16, not {wrong[0]!r}")
    levels = (checkpointing or str(recipe.engine.activation_checkpointing)).split(",")
    parsed = [int(level) if level.isdecimal() else level for level in levels]
    return [Setting(int(size), level) for level, size in product(parsed, sizes)]


def format_table(recipe: Recipe, measured: Sequence[Measured], world_size: int) -> str:
    """Aligned text: rates are over all ranks, TFLOP/s and memory of one, the split is in shares of the time."""
    rows = [HEADINGS, *(_row(item) for item in measured)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    title = (
        f"{recipe.name}: {recipe.model.family} of width {recipe.model.width} and depth {recipe.model.depth}, "
        f"{recipe.training.precision}, engine {recipe.engine.kind} on {world_size} rank(s) of "
        f"{device_name(ALONE.device)}, blocks {'' if recipe.engine.compile else 'not '}compiled, torch "
        f"{torch.__version__}; synthetic data"
    )
    return "\n".join([title, *lines])


def _row(item: Measured) -> tuple[str, ...]:
    asked = (str(item.setting.micro_batch_size), str(item.setting.activation_checkpointing))
    costs = item.costs
    if costs is None:
        return (*asked, "out of memory", *[""] * (len(HEADINGS) - 3))
    step = sum(costs.seconds.values())
    return (
        *asked,
        f"{costs.images_per_second:.1f}",
        f"{costs.tokens_per_second:.0f}",
        f"{costs.flops_per_second / 1e12:.3g}",
        "n/a" if costs.mfu is None else f"{costs.mfu:.1%}",
        f"{costs.peak_bytes / 2**30:.2f}",
        f"{step * 1000:.1f}",
        *(f"{costs.seconds[phase] / step:.0%}" for phase in ("forward", "backward", "optimizer")),
    )
