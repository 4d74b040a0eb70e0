"""`megadit verify-trajectory`: one recipe, one curve."""

from typing import Annotated

import typer

from megadit.cli.options import Overrides, RecipeName


def verify_trajectory(
    recipe: RecipeName,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run.")] = 30,
    only: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Some of the engines, such as fsdp-2,hsdp-2x2,zero3-4.  [default: all]"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Kill a run on each engine and resume it on each: every ordered pair.")
    ] = False,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative difference that passes.")] = 1e-4,
) -> None:
    """Check that RECIPE gives the same curve on every engine and number of ranks.

    Trains a few steps on a single process, FSDP2, HSDP and DeepSpeed ZeRO-1, -2 and -3 with 2 and 4 local ranks, and
    prints how far each is from the single process: loss and gradient norm at the worst step, weights and averages at
    the end. Exit code 1 when a difference is too large. Everything that the recipe says of engines is overridden but
    activation checkpointing and reshard_after_forward. In bf16 engines round in different places: give a larger
    tolerance.

    With --resume, a run on each engine is killed between two checkpoints, and copies of it go on on every engine (ten
    runs are killed and a hundred resumed, unless --only names fewer); the curve after that is compared.

    \b
    Examples:
      megadit verify-trajectory quickstart model.width=64
      megadit verify-trajectory quickstart --only fsdp-2,zero1-2 --steps 10
      megadit verify-trajectory quickstart training.precision=bf16 --tolerance 0.05
      megadit verify-trajectory quickstart model.width=64 --resume
    """
    from megadit.launcher import short_runs

    verify = short_runs.verify_resume if resume else short_runs.verify_trajectory
    code, table = verify(recipe, overrides or [], steps, only, tolerance)
    print(table)
    raise typer.Exit(code)
