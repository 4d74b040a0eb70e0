"""`megadit bench`: how fast a recipe trains on this machine, without data."""

from typing import Annotated

import typer

from megadit.cli.options import Overrides, RecipeName


def bench(
    recipe: RecipeName,
    overrides: Overrides = None,
    micro_batch: Annotated[
        str | None,
        typer.Option(help="Samples of one forward pass on one rank, with commas between.  [default: the recipe's]"),
    ] = None,
    activation_checkpointing: Annotated[
        str | None,
        typer.Option(help="Levels (none, selective, full, or k for every k-th block).  [default: the recipe's]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure, after two to warm up.")] = 10,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the captions.  [default: the most the model takes, or 77]")
    ] = None,
) -> None:
    """Measure how fast RECIPE trains on synthetic latents and text features: no data, no disk.

    Prints a table with one line for each size of micro-batch and level of activation checkpointing: images and tokens
    per second, model TFLOP/s and their share of the GPU's peak (MFU; n/a on other hardware), peak memory, and where
    the time of a step goes. A step is one micro-batch on each rank. Runs on the recipe's engine and ranks.

    \b
    Examples:
      megadit bench quickstart --micro-batch 16,32
      megadit bench dit-xl2-mup engine.num_ranks=1 engine.compile=true --micro-batch 64,128
      megadit bench mmdit-18b model.depth=4 model.repa.block=4 --activation-checkpointing none,selective,full
    """
    from megadit.launcher.bench import bench as launch_or_join

    raise typer.Exit(
        launch_or_join(recipe, overrides or [], micro_batch, activation_checkpointing, steps, text_tokens, print)
    )
