"""`megadit checkpoint`: look at the checkpoints of a run, make files for inference of them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

checkpoint_app = typer.Typer(
    help="List, verify and convert the checkpoints of a run.", no_args_is_help=True, rich_markup_mode=None
)


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
Out = Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File to write.")]
Weights = Annotated[
    str | None,
    typer.Option(help="Average, such as ema_0.999, or `weight` for the raw weights.  [default: the first average]"),
]
OutDtype = Annotated[Dtype, typer.Option("--dtype", help="Type of the numbers in the file.")]


@checkpoint_app.command("ls")
def ls(run: Run) -> None:
    """List checkpoints, oldest first: images seen, steps, size, weights, and whether all files have their size.

    \b
    Example:
      megadit checkpoint ls runs/quickstart
    """
    from megadit.training.checkpoint.listing import list_checkpoints

    print(list_checkpoints(run))


@checkpoint_app.command("verify")
def verify(
    run: Run,
    images: Annotated[
        list[int] | None, typer.Option(help="Only the checkpoint of so many images seen; repeatable.")
    ] = None,
) -> None:
    """Read every byte of the checkpoints of a run and compare the CRCs. Exit code 1 when one is damaged.

    \b
    Examples:
      megadit checkpoint verify runs/quickstart
      megadit checkpoint verify runs/quickstart --images 12800
    """
    from megadit.training.checkpoint.listing import verify_checkpoints

    lines, num_damaged = verify_checkpoints(run, images or [])
    print("\n".join(lines))
    raise typer.Exit(1 if num_damaged else 0)


@checkpoint_app.command("convert")
def convert(
    run: Run,
    out: Out,
    weights: Weights = None,
    dtype: OutDtype = Dtype.fp32,
    images: Annotated[
        int | None, typer.Option(help="The checkpoint of so many images seen.  [default: the newest whole one]")
    ] = None,
) -> None:
    """Write one set of weights as a safetensors file, by the names of the model's state dict.

    \b
    Example:
      megadit checkpoint convert runs/quickstart quickstart.safetensors --weights ema_0.99 --dtype bf16
    """
    from megadit.training.checkpoint.export import convert as write

    print(f"wrote {out}: {write(run, out, weights, dtype.value, images)}")


@checkpoint_app.command("average")
def average(
    run: Run,
    out: Out,
    weights: Weights = None,
    dtype: OutDtype = Dtype.fp32,
    images: Annotated[
        list[int] | None,
        typer.Option(help="Take the checkpoint of so many images seen; repeatable.  [default: all of the run]"),
    ] = None,
) -> None:
    """Write the mean of the weights of several checkpoints as a safetensors file.

    \b
    Example:
      megadit checkpoint average runs/quickstart mean.safetensors --weights weight --images 12800 --images 25600
    """
    from megadit.training.checkpoint.export import average as write

    print(f"wrote {out}: {write(run, out, weights, dtype.value, images or [])}")
