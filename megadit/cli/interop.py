"""`megadit interop`: published checkpoints in, folders of diffusers out."""

from pathlib import Path
from typing import Annotated

import typer

from megadit.cli.options import Overrides

interop_app = typer.Typer(
    help="Read published checkpoints, write folders of diffusers.", no_args_is_help=True, rich_markup_mode=None
)


@interop_app.command("load-published")
def load_published(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt, .pth or .safetensors file.")],
    recipe: Annotated[str, typer.Option(help="Recipe of the same model, such as dit-xl2-mup or pixart-mup.")],
    out: Annotated[Path, typer.Option(help="Folder to write recipe.yaml and model.safetensors to.")],
    overrides: Overrides = None,
    raw: Annotated[bool, typer.Option("--raw", help="The raw weights instead of their average.")] = False,
) -> None:
    """Read a published checkpoint of DiT or PixArt-alpha, every name of it and no other.

    \b
    Example:
      megadit interop load-published DiT-XL-2-256x256.pt --recipe dit-xl2-sp --out models/dit-xl2
    """
    from megadit.interop.commands import load_published_command

    load_published_command(recipe, checkpoint, out, overrides or [], "raw" if raw else "ema")
    print(f"wrote {out}")


@interop_app.command("export-diffusers")
def export_diffusers(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or one that load-published wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder to write transformer/ and scheduler/ to.")],
    ema: Annotated[
        str | None,
        typer.Option(help="Average of a run's weights, such as ema_0.99, or `weight`.  [default: the first average]"),
    ] = None,
    allow_timestep_mismatch: Annotated[
        bool,
        typer.Option("--allow-timestep-mismatch", help="Export a DiT whose timesteps the class embeds otherwise."),
    ] = False,
) -> None:
    """Write a model as the transformer of DiTPipeline, PixArtAlphaPipeline or StableDiffusion3Pipeline.

    The multiplier of the readout is folded into its weights: the class gives what our model gives.

    \b
    Example:
      megadit interop export-diffusers runs/quickstart exported
    """
    from megadit.interop.commands import export_command

    export_command(source, out, ema, allow_timestep_mismatch)
    print(f"wrote {out}")
