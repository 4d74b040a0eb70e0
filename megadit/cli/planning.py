"""`megadit plan`: what a recipe needs and costs on a machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megadit.cli.options import Overrides, RecipeName


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="a100, h100, ... [default: what the recipe is made for]")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of one.  [default: as usual]")] = None,
    assume: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another value of an assumption; repeatable.")
    ] = None,
    fastest: Annotated[
        bool,
        typer.Option("--fastest", help="Look for the fastest settings, also where the recipe's run as they should."),
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Write the settings found as a recipe.")] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Hold the formulas to a real step of one rank, without its memory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of text.")] = False,
) -> None:
    """Say what RECIPE needs and costs: memory, time, money, data, checkpoints. No GPU, no weights.

    Where it does not fit its machine, or waits for the network, the nearest settings that run are looked for: other
    micro-batches, checkpointing, replicas and gradients, which change no curve. Exit code 1 says that it does not fit.

    \b
    Examples:
      megadit plan mmdit-18b
      megadit plan mmdit-18b --gpu h200 --nodes 8 --out mine.yaml
      megadit plan dit-xl2-mup --gpu a100 --assume compute_share=0.5 --assume dollars_per_gpu_hour=1.5
      megadit plan pixart-mup --fastest
      megadit plan dit-xl2-mup --trace
    """
    from megadit.planning.answers import plan_recipe

    asked = {"gpu": gpu, "num_nodes": nodes, "gpus_per_node": gpus_per_node}
    found = plan_recipe(recipe, overrides or [], asked, assume or [], fastest, trace, out)
    typer.echo(json.dumps(found.tree, indent=1) if as_json else found.text)
    raise typer.Exit(0 if found.fits else 1)


def recipe_table() -> None:
    """Print a table of the shipped recipes on the machines that they are made for, as Markdown.

    \b
    Example:
      megadit recipe table
    """
    from megadit.planning.answers import table_of_recipes

    typer.echo(table_of_recipes())
