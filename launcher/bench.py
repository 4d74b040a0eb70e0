"""`megadit bench`: start the local ranks of a recipe, or be one of them; rank 0 prints."""

from collections.abc import Callable, Sequence

from megadit.exit_codes import DONE
from megadit.launcher.environment import Ranks
from megadit.launcher.join import launch_or_join
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
    recipe = load(source, overrides)

    def measure(ranks: Ranks) -> int:
        from megadit.training import bench_table, synthetic

        settings = bench_table.parse_settings(recipe, micro_batches, checkpointing, ranks.world_size)
        measured = synthetic.bench(recipe, settings, num_steps, text_tokens)
        if ranks.rank == 0:
            say(bench_table.format_table(recipe, measured, ranks.world_size))
        return DONE

    given = {"micro-batch": micro_batches, "activation-checkpointing": checkpointing, "text-tokens": text_tokens}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    command = ["bench", source, *overrides, f"--steps={num_steps}", *options]
    return launch_or_join(recipe.engine.num_ranks, measure, command)
