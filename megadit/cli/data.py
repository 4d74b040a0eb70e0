"""`megadit data`: pack data sets and serve them locally."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from megadit.launcher.processes import wait_for_interrupt

data_app = typer.Typer(help="Pack data sets and serve them locally.", no_args_is_help=True, rich_markup_mode=None)


@data_app.command("pack")
def data_pack(
    source: Annotated[str, typer.Argument(help="`emoji` (shipped), or a folder or zip of images with captions.jsonl.")],
    destination: Annotated[str, typer.Argument(help="s3://bucket/prefix or a folder; gets train/ and validation/.")],
    label: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Metadata field whose values are the classes (emoji: subgroup).")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Side of the packed images, in pixels.")] = 32,
    encoder: Annotated[str, typer.Option(help="`minilm`, or the folder of a transformers text model.")] = "minilm",
    where: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Keep samples whose metadata say so; repeatable.")
    ] = None,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples of one shard.")] = 512,
    holdout: Annotated[int, typer.Option(min=2, help="One concept in this many goes to validation/.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order in which samples are packed.")] = 0,
) -> None:
    """Pack images and captions into WebDataset shards with a manifest.

    Captions are encoded here, once. The same arguments give the same bytes; what is packed already is left as it is,
    and a different data set at DESTINATION is an error. The manifest is written last, so half a pack is never read.

    \b
    Examples:
      megadit data pack emoji s3://megadit/emoji --where skin_tone=false
      megadit data pack photos/ /data/photos --size 256 --encoder /models/t5
    """
    from megadit.data.pack import pack
    from megadit.data.sources import open_source
    from megadit.data.text_encoder import TextEncoder

    with _progress_bar("packing") as on_progress:
        packed = pack(
            open_source(source),
            destination,
            size=size,
            encoder=TextEncoder.load(encoder),
            seed=seed,
            shard_samples=shard_samples,
            holdout=holdout,
            where=where or [],
            label=label,
            on_progress=on_progress,
        )
    if not packed.skipped:
        counts = f"{packed.train.num_samples} training and {packed.validation.num_samples} validation samples"
        print(f"packed {counts} to {destination}")


@data_app.command("serve")
def data_serve(
    directory: Annotated[Path, typer.Argument(help="Folder of the stored objects; made if missing.")],
    bucket: Annotated[str, typer.Option(help="Bucket to make if it is missing.")] = "megadit",
) -> None:
    """Run an S3 server (SeaweedFS) on 127.0.0.1 until Ctrl-C.

    Prints the lines that let another shell use it. What it stores stays in DIRECTORY; address and keys are new each
    time.

    \b
    Example:
      megadit data serve runs/s3
    """
    from megadit.data.local_s3 import LocalS3

    with LocalS3(directory) as server:
        server.create_bucket(bucket)
        for name, value in server.environment.items():
            print(f"export {name}={value}")
        sys.stdout.flush()
        wait_for_interrupt()


@contextmanager
def _progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that moves a bar on the terminal; elsewhere it draws nothing."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
