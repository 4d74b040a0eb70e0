"""Loss against learning rate as a picture: one panel for each study, one line for each width."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from megadit.tuning.optimum import LrCurve, find_optimum

TOP = 2.0  # of the loss axis, in units of the smallest loss: what is above has not learned


def draw(panels: Sequence[tuple[str, Sequence[LrCurve]]], metric: str, out: Path) -> None:
    """Draw panels, each a title and its curves, to a PNG file.

    Lines are means over seeds, dots single trials, a star is the optimum (filled where a parabola was fitted). At the
    top, a cross is a trial that diverged, a triangle one whose loss is over twice the smallest: off the scale. `metric`
    says by its full name what the losses are of; where they go below 0, the scale is linear and ends there.
    """
    figure = Figure(figsize=(1.2 + 4.8 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    widths = sorted({curve.width for _, curves in panels for curve in curves})
    shades = mpl.colormaps["viridis"].resampled(max(2, len(widths) + 1))
    colours = {width: to_hex(shades(index)) for index, width in enumerate(widths)}
    lowest = min(curve.loss_SL.min() for _, curves in panels for curve in curves)
    top = lowest + (TOP - 1) * abs(lowest)
    if lowest > 0:
        all_axes[0].set_yscale("log")
    all_axes[0].set_ylim(lowest - 0.05 * abs(lowest), top)
    for axes, (title, curves) in zip(all_axes, panels, strict=True):
        _draw_panel(axes, curves, colours, top)
        axes.set_title(title)
        axes.set_xlabel("log2 of the base learning rate")
    where, name = metric.split("/")
    all_axes[0].set_ylabel(f"{name}, mean of the last fifth of training" if where == "training" else metric)
    all_axes[0].legend(handles=_legend(colours), fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130, format="png")


def _draw_panel(axes: Axes, curves: Sequence[LrCurve], colours: Mapping[int, str], top: float) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7))  # the axis is logarithmic, but spans an octave
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    for index, curve in enumerate(curves):
        colour, optimum = colours[curve.width], find_optimum(curve)
        axes.plot(curve.log2_lr_L, curve.mean_L, color=colour)
        for trial in curve.all_trials:
            log2_lr = math.log2(trial.recipe.optimizer.lr)
            if trial.value is not None and trial.value <= top:
                axes.plot(log2_lr, trial.value, ".", color=colour, alpha=0.5)
            elif trial.value is not None or trial.pruned:  # a row for each width, below each other
                marker = "x" if trial.value is None else "^"
                height = 0.98 - 0.03 * index
                axes.plot(log2_lr, height, marker, markersize=5, color=colour, transform=axes.get_xaxis_transform())
        axes.plot(
            optimum.estimate,
            optimum.loss,
            marker="*",
            markersize=14,
            color=colour,
            markerfacecolor=colour if optimum.fitted is not None else "white",
        )


def _legend(colours: Mapping[int, str]) -> list[Line2D]:
    lines = [Line2D([], [], color=colour, marker=".", label=f"width {width}") for width, colour in colours.items()]
    star = Line2D([], [], color="black", marker="*", markersize=10, linestyle="", label="best")
    cross = Line2D([], [], color="black", marker="x", linestyle="", label="diverged")
    triangle = Line2D([], [], color="black", marker="^", markersize=5, linestyle="", label="off the scale")
    return [*lines, star, cross, triangle]
