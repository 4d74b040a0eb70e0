"""The loss curve of a run as a picture, from its metrics.jsonl."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megadit.journal import read_file


def draw(run: Path, out: Path) -> Path:
    """Draw the training loss in total and by timestep, and the validation losses, against images seen.

    The dashed line is the validation loss of the best constant prediction: a model below it has learned something.
    Raises ValueError when `run` has no metrics yet.
    """
    train, validation = _read(run)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    total, by_timestep = figure.subplots(1, 2)
    _draw_total(total, train, validation)
    _draw_by_timestep(by_timestep, train)
    for axes in (total, by_timestep):
        axes.set_xlabel("images seen")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.suptitle(run.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, format="png")
    return out


def _read(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is not the folder of a run that has begun: it has no metrics.jsonl")
    lines = read_file(path)
    train = [line for line in lines if line["kind"] == "train"]
    if not train:
        raise ValueError(f"{path} has no line of training yet")
    return train, [line for line in lines if line["kind"] == "validation"]


def _draw_total(axes: Axes, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    metric = validation[-1].get("metric", "loss") if validation else "loss"
    measured = [line for line in train if metric in line]
    axes.plot(
        [line["images"] for line in measured],
        [line[metric] for line in measured],
        alpha=0.5,
        label="training" if metric == "loss" else f"training, {metric}",
    )
    curves: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in validation:
        curves[line["weights"]].append(line)
    for weights, lines in curves.items():
        axes.plot(
            [line["images"] for line in lines],
            [line["loss"] for line in lines],
            marker="o",
            markersize=3,
            label=f"validation, {weights} weights",
        )
    if validation:
        constant = validation[-1]["constant_loss"]
        axes.axhline(constant, color="black", linestyle="--", label="validation, best constant prediction")
    axes.set_title("total")


def _draw_by_timestep(axes: Axes, train: list[dict[str, Any]]) -> None:
    num_bins = len(train[0]["loss_bins"])
    for index in range(num_bins):
        seen = [line for line in train if line["loss_bins"][index] is not None]  # a bin can stay empty for a while
        axes.plot(
            [line["images"] for line in seen],
            [line["loss_bins"][index] for line in seen],
            label=f"timestep {index / num_bins:g} to {(index + 1) / num_bins:g}",
        )
    axes.set_title("training, by timestep")
