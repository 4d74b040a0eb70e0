"""`megadit eval report`: index.html, table.md and results.json about scored folders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from megadit.eval.report import tables
from megadit.eval.report.collect import GENEVAL, Run, collect, failures
from megadit.eval.report.tables import Cell, ScoreTable
from megadit.eval.report.template import PAGE
from megadit.eval.report.thumbnails import Picture, thumbnail, with_boxes
from megadit.eval.units import Unit
from megadit.files import write_text

NUM_SHEET = 48  # images of a run
NUM_PAIRS = 16  # prompts that several runs are compared on
NUM_FAILURES_PER_TAG = 4


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write a report on complete folders of generated images; the path of the page. See `collect` for errors."""
    runs = collect(list(folders))
    headline, groups, remarks = tables.headline(runs), tables.groups(runs), tables.protocols(runs)
    results = [
        {"name": run.name, "folder": str(run.folder), "manifest": run.manifest, "scores": run.scores} for run in runs
    ]
    write_text(out / "results.json", json.dumps({"runs": results, "remarks": remarks}, indent=1) + "\n")
    write_text(out / "table.md", tables.markdown([headline, *groups, tables.settings(runs)], remarks))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(PAGE).render(
        title=f"Evaluation of {', '.join(dict.fromkeys(run.manifest['checkpoint']['run'] for run in runs))}",
        subtitles=[_subtitle(run) for run in runs],
        runs=runs,
        remarks=remarks,
        headline=headline,
        groups=groups,
        settings=tables.settings(runs),
        pairs=_pairs(runs),
        sheets=[_sheet(run) for run in runs],
        failures=[_failures(run, metric) for run in runs for metric in GENEVAL if metric in run.scores],
        widths=_widths,
    )
    write_text(out / "index.html", page)
    return out / "index.html"


def _subtitle(run: Run) -> str:
    """Task, checkpoint and sampler of a run, in a line."""
    manifest, sampler = run.manifest, run.manifest["sampler"]
    return (
        f"{run.name}: {manifest['task']['id']}, {manifest['checkpoint']['images_seen']:,} images seen, "
        f"{manifest['weights']}, {sampler['name']} with {sampler['num_steps']} steps, "
        f"guidance {manifest['guidance_scale']:g}, {len(run.units):,} images"
    )


def _sheet(run: Run) -> dict[str, Any]:
    pictures = [thumbnail(unit.path, run.caption(unit.prompt)) for unit in _spread(run.units, NUM_SHEET)]
    return {"name": run.name, "pictures": pictures, "num_units": len(run.units)}


def _spread(units: Sequence[Unit], number: int) -> list[Unit]:
    """`number` of the units, evenly spaced, or all."""
    number = min(number, len(units))
    return [units[place * len(units) // number] for place in range(number)]


def _pairs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The first images of some prompts by every run, where all drew the same prompts."""
    if len(runs) < 2 or len({run.task() for run in runs}) > 1:
        return []
    firsts = [{unit.prompt: unit for unit in run.units if unit.image == 0} for run in runs]
    rows = []
    for unit in _spread(list(firsts[0].values()), NUM_PAIRS):
        pictures: list[Picture] = [thumbnail(first[unit.prompt].path, "") for first in firsts]
        rows.append({"pictures": pictures, "caption": runs[0].caption(unit.prompt)})
    return rows


def _failures(run: Run, metric: str) -> dict[str, Any]:
    shown = [
        {
            "url": with_boxes(failure.unit.path, failure.boxes),
            "caption": failure.caption,
            "tag": failure.tag,
            "reason": failure.reason,
        }
        for failure in failures(run, metric, NUM_FAILURES_PER_TAG)
    ]
    return {"name": run.name, "metric": metric, "failures": shown}


def _widths(cells: Sequence[Cell], table: ScoreTable) -> list[float]:
    """The lengths of a line's bars, in percent of the largest magnitude of the table."""
    largest = max(abs(cell.value) for line in table.lines for cell in line.cells if cell.value is not None) or 1.0
    return [round(100 * abs(cell.value) / largest, 1) if cell.value is not None else 0.0 for cell in cells]
