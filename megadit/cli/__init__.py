"""The `megadit` command: one short function per command, no logic. torch is imported inside, so that --help is fast."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megadit.cli.bench import bench_app
from megadit.cli.checkpoint import checkpoint_app
from megadit.cli.data import data_app
from megadit.cli.evaluation import eval_app
from megadit.cli.interop import interop_app
from megadit.cli.options import Overrides, RecipeName
from megadit.cli.planning import plan, recipe_table
from megadit.cli.trajectory import verify_trajectory
from megadit.cli.tuning import coord_check, sweep, transfer
from megadit.launcher.failures import run_reporting

EXIT_CODES = """\b
Exit codes:
  0    done
  1    error; one line on standard error says what was wrong
  2    the command line could not be understood
  75   interrupted with a checkpoint; the same command resumes
  130  interrupted with nothing to save"""

ENVIRONMENT = """\b
Environment:
  AWS_ENDPOINT_URL       S3 endpoint, for stores other than AWS
  AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, AWS_PROFILE
                         credentials, by boto3's usual chain
  MEGADIT_TRACEBACK=1    show the traceback of an error, too"""

app = typer.Typer(
    name="megadit",
    help="Pretrain diffusion transformers with muP: tune on a small model, train the big one.\n\n"
    "\b\nA first run, by hand (`make quickstart` does the same):\n"
    "  megadit data serve runs/s3            # a local S3 server; copy its export lines\n"
    "  megadit data pack emoji s3://megadit/emoji --size 16 --where skin_tone=false\n"
    "  megadit train quickstart\n"
    '  megadit sample runs/quickstart --prompt "red heart" --grid out.png\n\n' + EXIT_CODES + "\n\n" + ENVIRONMENT,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True, rich_markup_mode=None)
shapes_app = typer.Typer(help="Base shapes for muP.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(interop_app, name="interop")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.command()(plan)
app.command()(coord_check)
app.command()(sweep)
app.command()(transfer)
app.command("verify-trajectory")(verify_trajectory)
app.add_typer(recipe_app, name="recipe")
recipe_app.command("table")(recipe_table)
app.add_typer(shapes_app, name="shapes")


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run.  [default: runs/NAME]")] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH|URL",
            help="What to begin with: the run's newest whole checkpoint; nothing, which is refused where there is one; "
            "or, where the run has none, the checkpoint of another run of this recipe: its folder, a folder of one "
            "checkpoint, or the s3:// address that checkpoints.copy_url gave them.",
        ),
    ] = "auto",
    from_weights: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Begin with weights from elsewhere, and fresh moments and averages: the folder of a run or of a "
            "checkpoint, a published checkpoint (.pt, .pth, .safetensors), what load-published wrote, or a folder of "
            "diffusers. A resume goes on without it.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Which of them: an average of the run, such as ema_0.99, or `weight`.  [default: the first average]"
        ),
    ] = None,
) -> None:
    """Train what RECIPE says, or resume the run if it has begun.

    Starts engine.num_ranks local processes by itself; started by torchrun, deepspeed or srun it joins the ranks that
    they started. Ctrl-C or SIGTERM writes a checkpoint and stops; the same command goes on from there, on another
    engine or number of ranks too. The folder of the run gets the resolved recipe, the parameter table, metrics.jsonl,
    TensorBoard files and checkpoints.

    \b
    Examples:
      megadit train quickstart
      megadit train quickstart optimizer.lr=2^-8 training.num_images=4096 --run runs/lr8
      megadit train quickstart engine.kind=zero3        # go on under another engine
      megadit train quickstart --run runs/tuned --from-weights runs/quickstart --weights ema_0.99
      megadit train quickstart --run runs/again --resume runs/quickstart/checkpoints/images-0000004096
      torchrun --nproc-per-node 8 -m -- megadit train my.yaml engine.kind=fsdp --run runs/a
    """
    if weights is not None and from_weights is None:
        raise ValueError("--weights chooses among those of --from-weights PLACE")
    from megadit.launcher.train import train as start

    source = None
    if from_weights is not None:
        from megadit.interop.starting_weights import source_of

        source = source_of(from_weights, weights)
    raise typer.Exit(start(recipe, overrides or [], run, resume, source))


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="Folder of the run; its newest whole checkpoint is used.")],
    grid: Annotated[Path, typer.Option(help="PNG file of the labelled pictures.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; repeatable.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    ema: Annotated[
        str | None,
        typer.Option(
            help="Average of the weights, such as ema_0.99, or `weight` for none.  [default: the first average]"
        ),
    ] = None,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 is none.")] = 4.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 25,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    encoder: Annotated[
        str | None, typer.Option(help="Folder of the text encoder that the data was packed with, unless it is minilm.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="Folder of the autoencoder (AutoencoderKL of diffusers) of a model of latents.")
    ] = None,
) -> None:
    """Draw pictures for prompts with a trained model. The prompts of a class-conditional one are names of its classes.

    \b
    Examples:
      megadit sample runs/quickstart --prompt "red heart" --prompt "yellow star" --grid out.png
      megadit sample runs/quickstart --prompt-file prompts.txt --guidance-scale 2 --grid out.png
    """
    prompts = (prompt or []) + (prompt_file.read_text().splitlines() if prompt_file else [])
    if not prompts:
        raise ValueError("nothing to draw: give --prompt or --prompt-file")
    from megadit.sampling.generate import sample as generate

    generate(run, prompts, grid, ema, guidance_scale, steps, seed, encoder, vae)
    print(f"wrote {grid}")


@recipe_app.command("show")
def recipe_show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print the resolved recipe and its parameter table.

    The table has one line for each parameter: name, shape, role, width multiplier, initialisation, learning rate and
    weight decay. It is computed without allocating a weight. Where the recipe has stages, a line for each says what it
    changes, and the table is that of the first.

    \b
    Example:
      megadit recipe show quickstart model.width=512
    """
    from megadit.parametrization.table import build_table, format_table
    from megadit.recipe import dump, load, plan
    from megadit.recipe.stages import format_plan

    resolved = load(recipe, overrides or [])
    stages = plan(resolved)
    print(dump(resolved))
    if resolved.stages:
        print(format_plan(stages), end="\n\n")
    print(format_table(build_table(stages[0].recipe)))


@recipe_app.command("list")
def recipe_list() -> None:
    """Print the names of the shipped recipes."""
    from megadit.recipe import RECIPE_FOLDER

    print("\n".join(sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))))


@shapes_app.command("make")
def shapes_make(
    recipe: RecipeName,
    path: Annotated[Path, typer.Argument(metavar="OUT.bsh", help="File to write.")],
    overrides: Overrides = None,
) -> None:
    """Write the base shapes of RECIPE's model as a .bsh file (the format of the mup package).

    The base model has the width parametrization.base_width.

    \b
    Example:
      megadit shapes make quickstart out.bsh parametrization.base_shapes=null parametrization.base_width=128
    """
    from megadit.parametrization.base_shapes import make
    from megadit.recipe import load

    make(load(recipe, overrides or []), path)


@app.command()
def quickstart(
    run: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
) -> None:
    """Pack the shipped pictures into a local S3 server, train a small model on them, and sample from it.

    Needs no GPU, no account and no network. Ctrl-C leaves a checkpoint; the same command resumes.
    """
    from megadit.quickstart import quickstart as run_quickstart

    raise typer.Exit(run_quickstart(run))


def main() -> None:
    """Run the command line; an expected error becomes one line on standard error and exit code 1."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of libraries between ours
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where it found each setting
    run_reporting(app)
