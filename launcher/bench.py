"""`megadit bench`: start the local ranks of a recipe, or be one of them; rank 0 prints."""

from collections.abc import Callable, Sequence

from megadit.launcher.environment import detect, export
from megadit.launcher.failures import DONE
from megadit.launcher.local import launch
from megadit.launcher.processes import follow_parent
from megadit.recipe import load


def bench(
    source: str,
    overrides: Sequence[str],
    micro_batches: str | None,
    checkpointing: str | None,
    num_steps: int,
    text_tokens: int | None,
    say: Callable[[str], object],
) -> int:
    """Measure the recipe `source` with `overrides`; `say` gets the table.

    `micro_batches` and `checkpointing` are lists with commas between, by default what the recipe says. Raises
    ValueError for what is no such list.
    """
    follow_parent()
    recipe = load(source, overrides)
    ranks = detect()
    if not ranks.launched and recipe.engine.num_ranks > 1:
        options = [f"--steps={num_steps}"]
        given = {"micro-batch": micro_batches, "activation-checkpointing": checkpointing, "text-tokens": text_tokens}
        options += [f"--{name}={value}" for name, value in given.items() if value is not None]
        return launch(recipe.engine.num_ranks, ["-m", "megadit", "bench", source, *overrides, *options])
    if ranks.launched:
        export(ranks)
    from megadit.training import bench_table, synthetic

    settings = bench_table.parse_settings(recipe, micro_batches, checkpointing, ranks.world_size)
    measured = synthetic.bench(recipe, settings, num_steps, text_tokens)
    if ranks.rank == 0:
        say(bench_table.format_table(recipe, measured, ranks.world_size))
    return DONE
