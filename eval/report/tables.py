"""The tables of a report: metrics by run, groups by run, and how the runs were made."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadit.eval.report.collect import Run

NOTHING = "-"
SIGNIFICANT_DIGITS = 5
HIDDEN_KEYS = ("versions", "num_units")


@dataclass(frozen=True)
class Cell:
    """A number as text, and whether it is the best of its line."""

    text: str
    best: bool = False
    value: float | None = None


@dataclass(frozen=True)
class Line:
    title: str
    cells: list[Cell]
    note: str = ""


@dataclass(frozen=True)
class ScoreTable:
    title: str
    columns: list[str]
    lines: list[Line]


def headline(runs: Sequence[Run]) -> ScoreTable:
    """Every metric that some run has: value, standard error, number of images."""
    metrics = sorted({metric for run in runs for metric in run.scores})
    lines = []
    for metric in metrics:
        scores = [run.scores.get(metric) for run in runs]
        upwards = next(score["higher_is_better"] for score in scores if score)
        values = [score["value"] if score else None for score in scores]
        best = _best(values, upwards)
        cells = [Cell(_with_error(score), value == best, value) for score, value in zip(scores, values, strict=True)]
        counts = {score["n"] for score in scores if score}
        better = "higher is better" if upwards else "lower is better"
        lines.append(Line(metric, cells, f"{better}, n = {' / '.join(map(str, sorted(counts)))}"))
    return ScoreTable("Scores", [run.name for run in runs], lines)


def groups(runs: Sequence[Run]) -> list[ScoreTable]:
    """For every metric with numbers by category or tag: those."""
    tables = []
    for metric in sorted({metric for run in runs for metric, score in run.scores.items() if score["groups"]}):
        scores = [run.scores.get(metric, {}) for run in runs]
        upwards = next(score["higher_is_better"] for score in scores if score)
        names = list(dict.fromkeys(name for score in scores for name in score.get("groups", {})))
        lines = []
        for name in names:
            values = [score.get("groups", {}).get(name) for score in scores]
            errors = [score.get("groups_stderr", {}).get(name) for score in scores]
            best = _best(values, upwards)
            pairs = zip(values, errors, strict=True)
            lines.append(Line(name, [Cell(_number(value, error), value == best, value) for value, error in pairs]))
        tables.append(ScoreTable(metric, [run.name for run in runs], lines))
    return tables


def settings(runs: Sequence[Run]) -> ScoreTable:
    """How each run was made; `note` says which lines differ."""
    manifests = [_flatten(run.manifest) for run in runs]
    keys = list(dict.fromkeys(key for manifest in manifests for key in manifest))
    lines = []
    for key in keys:
        texts = [manifest.get(key, NOTHING) for manifest in manifests]
        lines.append(Line(key, [Cell(text) for text in texts], "differs" if len(set(texts)) > 1 else ""))
    return ScoreTable("How the images were made", [run.name for run in runs], lines)


def protocols(runs: Sequence[Run]) -> list[str]:
    """Sentences on scores that stand in one line and were not taken in one way."""
    found = []
    for metric in sorted({metric for run in runs for metric in run.scores}):
        scores = [run.scores[metric] for run in runs if metric in run.scores]
        for key in ("version", "weights", "n"):
            if len({json.dumps(score[key], sort_keys=True) for score in scores}) > 1:
                found.append(f"{metric}: {key} differs between runs; these numbers do not compare")
        references = {json.dumps(_reference(score), sort_keys=True) for score in scores}
        if len(references) > 1:
            found.append(f"{metric}: the reference differs between runs; these numbers do not compare")
    if len({run.task() for run in runs}) > 1:
        found.append("the runs drew different prompts; their numbers do not compare")
    return found


def _reference(score: Mapping[str, Any]) -> Any:
    """What a score compares with, but for its path."""
    reference = score["settings"].get("reference", {})
    return {key: value for key, value in reference.items() if key != "name"}


def markdown(tables: Sequence[ScoreTable], remarks: Sequence[str]) -> str:
    """The tables for a README; the best of a line is bold."""
    parts = []
    for table in tables:
        parts.append(f"## {_escape(table.title)}\n")
        parts.append(f"| | {' | '.join(_escape(name) for name in table.columns)} | |")
        parts.append("|---" * (len(table.columns) + 2) + "|")
        for line in table.lines:
            cells = [f"**{_escape(cell.text)}**" if cell.best else _escape(cell.text) for cell in line.cells]
            parts.append(f"| {_escape(line.title)} | {' | '.join(cells)} | {line.note} |")
        parts.append("")
    parts += [f"- {remark}" for remark in remarks]
    return "\n".join(parts).rstrip() + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _best(values: Sequence[float | None], upwards: bool) -> float | None:
    """The best of several; none of one."""
    there = [value for value in values if value is not None]
    return None if len(there) < 2 else max(there) if upwards else min(there)


def _with_error(score: Mapping[str, Any] | None) -> str:
    return NOTHING if score is None else _number(score["value"], score["stderr"])


def _number(value: float | None, error: float | None) -> str:
    """A value with its standard error, which says how many digits mean something."""
    if value is None:
        return NOTHING
    if not error:
        return f"{value:.{SIGNIFICANT_DIGITS}g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))  # two digits of the error
    return f"{value:.{decimals}f} \u00b1 {error:.{decimals}f}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if prefix + key in HIDDEN_KEYS:
            continue
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat
