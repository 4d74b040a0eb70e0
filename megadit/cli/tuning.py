"""`megadit coord-check`, `sweep` and `transfer`: what muP is for."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megadit.cli.options import Overrides, RecipeName


def coord_check(
    recipe: RecipeName,
    overrides: Overrides = None,
    widths: Annotated[str, typer.Option(help="Widths to train, with commas between.")] = "32,64,128,256",
    steps: Annotated[int, typer.Option(min=1, help="Steps to train.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds to average over.")] = 3,
    band: Annotated[float, typer.Option(min=0, help="Largest |slope| that passes.")] = 0.3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the figure and table.  [default: runs/NAME-coord]")
    ] = None,
) -> None:
    """Check that activations do not depend on width, layer by layer.

    Trains RECIPE's model at several widths for a few steps on one batch and fits log mean |activation| against log
    width. Exit code 1 when a slope leaves the band: then what is tuned on a small model does not transfer. Runs on the
    recipe's engine and ranks. Writes coord_check.png and coord_check.csv.

    \b
    Examples:
      megadit coord-check mmdit-mup-proxy-cpu
      megadit coord-check dit-xl2-sp-cpu                      # fails, as it should
      megadit coord-check mmdit-mup-proxy-cpu engine.kind=zero3 engine.num_ranks=2
    """
    from megadit.tuning.coord_launch import coord_check as start

    raise typer.Exit(start(recipe, overrides or [], widths, steps, seeds, band, out))


def sweep(
    recipe: RecipeName,
    overrides: Overrides = None,
    study: Annotated[
        Path | None, typer.Option(help="Folder of the study; made if missing.  [default: studies/NAME]")
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES", help="What to try: a list (32,64,128) or a range (2^-9..2^-5, 0..2000); repeatable."
        ),
    ] = None,
    preset: Annotated[
        Literal["paper"] | None,
        typer.Option(help="Adds a space: `paper` has learning rate, clipping, REPA weight and warm-up."),
    ] = None,
    sampler: Annotated[Literal["grid", "random"], typer.Option(help="Every combination, or random ones.")] = "grid",
    trials: Annotated[int | None, typer.Option(min=1, help="How many random ones.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random ones.")] = 0,
    metric: Annotated[
        str,
        typer.Option(
            help="What is compared: `training` (mean of the last fifth of the steps) or `validation` (the last one) of "
            "the objective's first metric; training/NAME or validation/NAME of another, or of `loss`, the weighted sum."
        ),
    ] = "training",
    workers: Annotated[int, typer.Option(min=1, help="Trials that run at once.")] = 1,
) -> None:
    """Train RECIPE at many points of a space of hyperparameters.

    Each trial is an ordinary run in STUDY/trials, on any engine; one that diverges is stopped and counts as pruned.
    Ctrl-C leaves checkpoints; the same command goes on, and one with more points extends the study. Several may work on
    one study at once. `megadit transfer` says what was found; optuna-dashboard reads STUDY/study.db.

    \b
    Examples:
      megadit sweep quickstart --space model.width=64,128 --space optimizer.lr=2^-8..2^-5 --space seed=0,1,2
      megadit sweep my.yaml --preset paper --sampler random --trials 80 --workers 8 --study studies/mmdit
    """
    from megadit.tuning.sweep import sweep as run_sweep

    raise typer.Exit(
        run_sweep(
            recipe,
            study,
            space or [],
            overrides or [],
            preset=preset,
            sampler=sampler,
            num_trials=trials,
            seed=seed,
            metric=metric,
            num_workers=workers,
        )
    )


def transfer(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="Folders of studies to compare.")],
    to: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Recipe to tune as the (first) study found best.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The tuned recipe, a .yaml file to write.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="PNG file: loss against learning rate at each width, a panel for each study.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="CSV file: every trial with its loss.")] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Let the target differ from the study in KEY all the same; repeatable."),
    ] = None,
) -> None:
    """Say which learning rate was best at each width of a study, and tune a larger model with it.

    The target may differ from the study in width, batch size, length, warm-up and data. A different depth, head
    dimension, objective, parametrization and so on is refused: nothing says that the optimum stays.

    \b
    Examples:
      megadit transfer studies/mup studies/sp --figure transfer.png
      megadit transfer studies/mup --to big.yaml --out big-tuned.yaml
    """
    from megadit.tuning.transfer import transfer as report_and_write

    print(report_and_write(studies, to, out, figure_path=figure, table_path=table, allow=allow or []))
