"""The coordinate check as a figure, a table and a verdict."""

import csv
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from megadit.recipe import Recipe
from megadit.tuning.coord_check import CoordCheck

NUM_WORST = 5


def write(check: CoordCheck, band: float, recipe: Recipe, folder: Path) -> str:
    """Write coord_check.png and coord_check.csv; returns the verdict in a few lines."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{recipe.name}: {recipe.model.family}, {recipe.parametrization.kind}, lr {recipe.optimizer.lr:.4g}"
    draw(check, band, title, folder / "coord_check.png")
    _write_table(check, folder / "coord_check.csv")
    return f"{verdict(check, band)}\nfigure and table: {folder / 'coord_check.png'}, {folder / 'coord_check.csv'}"


def verdict(check: CoordCheck, band: float) -> str:
    """Whether it passes, and the slopes that are furthest from 0."""
    slopes = check.slopes()
    order = np.argsort(-np.abs(np.nan_to_num(slopes, nan=0.0, posinf=np.inf)), axis=None)
    outside = int((np.abs(slopes) > band).sum())
    widths = ", ".join(map(str, check.widths))
    lines = [
        f"slopes of log mean |activation| in log width, over widths {widths}; "
        f"{outside} of {np.count_nonzero(~np.isnan(slopes))} are outside +-{band:g}"
    ]
    for flat in order[:NUM_WORST]:
        step, layer = np.unravel_index(flat, slopes.shape)
        lines.append(f"  {slopes[step, layer]:+.3f}  after {step} steps  {check.layers[layer]}")
    lines.append(
        "PASS: activations do not depend on width" if check.passes(band) else "FAIL: activations depend on width"
    )
    return "\n".join(lines)


def draw(check: CoordCheck, band: float, title: str, path: Path) -> None:
    """Activations against width after the last step on the left, all slopes by layer and step on the right."""
    height = max(4.5, 1.5 + 0.16 * len(check.layers))
    figure = Figure(figsize=(13, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_sizes(left, check)
    _draw_slopes(right, check, band)
    figure.suptitle(title)
    figure.savefig(path, dpi=110, format="png")


def _draw_sizes(axes: Axes, check: CoordCheck) -> None:
    means = check.means()[:, -1]
    for layer in range(len(check.layers)):
        if (means[:, layer] > 0).all():
            axes.plot(check.widths, means[:, layer], marker="o", markersize=3, linewidth=1, alpha=0.7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(check.widths, [str(width) for width in check.widths])
    axes.set_xlabel("width")
    axes.set_ylabel("mean |activation|, one line a layer")
    axes.set_title(f"after {check.sizes.shape[2] - 1} steps")
    axes.grid(alpha=0.3)


def _draw_slopes(axes: Axes, check: CoordCheck, band: float) -> None:
    slopes = check.slopes().T  # [layers, steps]
    limit = max(1.0, 3 * band)
    shown = np.clip(slopes, -limit, limit)
    picture = axes.imshow(shown, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit))
    axes.set_yticks(range(len(check.layers)), check.layers, fontsize=6)
    axes.set_xticks(range(slopes.shape[1]))
    axes.set_xlabel("updates made (empty: activations are 0)")
    axes.set_title(f"slope in log width; marked where outside +-{band:g}")
    for layer, step in zip(*np.nonzero(np.abs(slopes) > band), strict=True):
        axes.text(step, layer, f"{slopes[layer, step]:.2f}", ha="center", va="center", fontsize=6)
    assert axes.figure is not None
    axes.figure.colorbar(picture, ax=axes)


def _write_table(check: CoordCheck, path: Path) -> None:
    """One line per layer and step: the mean |activation| at each width, and the slope."""
    means, slopes = check.means(), check.slopes()
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["layer", "step", *(f"width {width}" for width in check.widths), "slope"])
        for layer, name in enumerate(check.layers):
            for step in range(means.shape[1]):
                slope = slopes[step, layer]
                sizes = [f"{size:.6g}" for size in means[:, step, layer]]
                table.writerow([name, step, *sizes, "" if math.isnan(slope) else f"{slope:.4f}"])
