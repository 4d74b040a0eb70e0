"""`megadit bench`: what this machine does, in ratios beside a named baseline."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from megadit.cli.options import Overrides, RecipeName

if TYPE_CHECKING:
    from megadit.benchmarks.findings import Table

Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
Pairs = Annotated[int, typer.Option(min=1, help="Pairs of steps to time, after two to warm up.")]
Precision = Literal["fp32", "bf16"]


class _Group(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Say how what was `megadit bench RECIPE` is spelled."""
        if args and self.get_command(ctx, args[0]) is None:
            names = ", ".join(self.list_commands(ctx))
            raise ValueError(f"megadit bench {args[0]}: say what to measure, {names}: `megadit bench train {args[0]}`")
        return super().resolve_command(ctx, args)


bench_app = typer.Typer(
    cls=_Group,
    help="Measure this machine: ratios beside a named baseline, in one run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench_app.command()
def train(
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
    sharding: Annotated[
        bool, typer.Option("--sharding", help="Instead: FSDP2 on one rank beside the plain module.")
    ] = False,
    pairs: Pairs = 15,
    json: Json = None,
) -> None:
    """How fast RECIPE trains on synthetic latents and text features: no data, no disk.

    One line for each size of micro-batch and level of activation checkpointing: images and tokens per second, model
    TFLOP/s and their share of the GPU's peak (MFU; n/a on other hardware), peak memory, and where the time of a step
    goes. A step is one micro-batch on each rank. Runs on the recipe's engine and ranks.

    \b
    Examples:
      megadit bench train quickstart --micro-batch 16,32
      megadit bench train quickstart --sharding --pairs 25
      megadit bench train dit-xl2-mup engine.num_ranks=1 engine.compile=true --micro-batch 64,128
      megadit bench train mmdit-mup-proxy-cpu --activation-checkpointing none,selective,full --json train.json
    """
    if sharding:
        from megadit.benchmarks.sharding_cost import bench_sharding
        from megadit.recipe import load, one_stage

        size = None if micro_batch is None else int(micro_batch)
        _show([bench_sharding(one_stage(load(recipe, overrides or []), "megadit bench"), size, pairs)], json)
        return
    from megadit.benchmarks.train_speed import bench_train

    code = bench_train(
        recipe,
        overrides or [],
        micro_batch,
        activation_checkpointing,
        steps,
        text_tokens,
        lambda table: _show([table], json),
    )
    raise typer.Exit(code)


@bench_app.command()
def data(
    samples: Annotated[int, typer.Option(min=48, help="Pictures of 1500 pixels, 0.8 MB each.")] = 144,
    rounds: Annotated[int, typer.Option(min=1, help="Of each piece of work, after one to warm up.")] = 3,
    minutes: Annotated[float, typer.Option(min=0, help="How long memory is watched; 0 is not at all.")] = 0,
    workers: Annotated[int, typer.Option(min=0, max=2, help="Processes that stream meanwhile.")] = 0,
    json: Json = None,
) -> None:
    """The data plane beside GETs of whole shards, webdataset and a plain decode, from the same files.

    Starts a local S3 server and fills it with SA-1B-shaped shards.

    \b
    Example:
      megadit bench data --samples 144 --rounds 3
    """
    from megadit.benchmarks.data_speed import bench_data

    _show([bench_data(samples, rounds, minutes, workers)], json)


@bench_app.command()
def checkpoint(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    folder: Annotated[Path, typer.Option(help="On the disk to measure.")] = Path(),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    json: Json = None,
) -> None:
    """Saving and loading RECIPE's state beside dd, and how long training stands still for an asynchronous save.

    \b
    Example:
      megadit bench checkpoint quickstart model.width=256 --rounds 3
    """
    from megadit.benchmarks.checkpoint_speed import bench_checkpoint

    _show([bench_checkpoint(recipe, overrides or [], folder, rounds)], json)


@bench_app.command()
def memory(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    engines: Annotated[str, typer.Option(help="With commas between.")] = "single,fsdp,hsdp,zero1,zero2,zero3",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas between.")] = "1,2,4",
    options: Annotated[str, typer.Option(help="Settings that are compared, such as bf16,saving; or all.")] = "plain",
    json: Json = None,
) -> None:
    """What a rank holds while it trains on the processors, beside what the formula says. Linux only.

    \b
    Example:
      megadit bench memory quickstart --engines fsdp --ranks 1,2
      megadit bench memory quickstart --options all
    """
    from megadit.benchmarks.train_memory import OPTIONS, bench_memory, parse_ranks

    chosen = list(OPTIONS) if options == "all" else options.split(",")
    _show([bench_memory(recipe, overrides or [], engines.split(","), parse_ranks(ranks), chosen)], json)


@bench_app.command()
def peers(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples of a step.  [default: of one rank]")] = None,
    precision: Annotated[Precision | None, typer.Option(help="[default: the recipe's]")] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Length of the captions.")] = 16,
    pairs: Pairs = 15,
    json: Json = None,
) -> None:
    """The training step of RECIPE's model beside diffusers' class of the same architecture and sizes.

    \b
    Example:
      megadit bench peers quickstart --pairs 25
    """
    from megadit.benchmarks.peer_speed import bench_peers
    from megadit.recipe import load, one_stage

    loaded = one_stage(load(recipe, overrides or []), "megadit bench")
    size = batch or loaded.training.batch_size // loaded.engine.num_ranks
    _show([bench_peers(loaded, size, text_tokens, precision or loaded.training.precision, pairs)], json)


@bench_app.command("eval")
def evaluation(
    vectors: Annotated[int, typer.Option(min=16, help="Features that are scored.")] = 50_000,
    reference: Annotated[int, typer.Option(min=16, help="Features of the reference.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Images of one forward pass of a network.")] = 8,
    pairs: Pairs = 3,
    json: Json = None,
) -> None:
    """The networks of evaluation beside a matrix product, and the time of a score's parts.

    \b
    Example:
      megadit bench eval --vectors 10000 --reference 5000
    """
    from megadit.benchmarks.eval_speed import bench_eval

    _show(bench_eval(vectors, reference, batch, pairs), json)


@bench_app.command()
def kernels(
    width: Annotated[int, typer.Option(min=1)] = 1024,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Image tokens of a sample.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 2,
    precision: Annotated[Precision, typer.Option()] = "fp32",
    pairs: Pairs = 15,
    json: Json = None,
) -> None:
    """Each kernel beside its definition in plain PyTorch: time, and bytes kept for the backward pass.

    \b
    Example:
      megadit bench kernels --width 512 --precision bf16
    """
    from megadit.benchmarks.kernel_speed import bench_kernels

    _show([bench_kernels(width, head_dim, tokens, batch, precision, pairs)], json)


def _show(tables: Sequence["Table"], json: Path | None) -> None:
    from megadit.benchmarks.findings import write_json

    print("\n\n".join(map(str, tables)))
    if json is not None:
        write_json(tables, json)
