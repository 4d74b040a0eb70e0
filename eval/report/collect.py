"""What a folder of generated images says for a report: how it was made, its scores, and what failed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.eval.picture_sets import Generated, fingerprint
from megadit.eval.units import Unit, read_manifest, read_prompts

GENEVAL = ("geneval", "geneval-hf")


@dataclass(frozen=True)
class Run:
    """A complete folder with its scores, by metric."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    prompts: list[dict[str, Any]]
    units: list[Unit]
    scores: dict[str, dict[str, Any]]

    def task(self) -> str:
        """Runs with one task drew the same prompts, so their images can be shown side by side."""
        return f"{self.manifest['task']['id']}-{self.manifest.get('prompts_sha256', '')}"

    def caption(self, prompt: int) -> str:
        """What to show for a prompt: its text, or its class."""
        record = self.prompts[prompt]
        return record["prompt"] or f"class {record['label']}"

    def rows(self, metric: str) -> list[dict[str, Any]]:
        """The lines of a score's rows, one for each image."""
        path = self.folder / "scores" / self.scores[metric]["rows"]
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def collect(folders: list[Path]) -> list[Run]:
    """The folders as runs, in their order, named by what tells them apart.

    Raises ValueError for a folder that is incomplete, is given twice, or has scores of other images than it holds.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"{next(f for f in folders if resolved.count(f.resolve()) > 1)} is given twice")
    names = _names(resolved)
    return [_read(name, folder) for name, folder in zip(names, folders, strict=True)]


def _names(folders: list[Path]) -> list[str]:
    """The parts of the paths between what all begin with and what all end with."""
    if len(folders) == 1:
        return [folders[0].name]
    parts = [folder.parts for folder in folders]
    shortest = min(map(len, parts))
    first = next((place for place in range(shortest) if len({part[place] for part in parts}) > 1), shortest - 1)
    num_last = next((n for n in range(shortest - first) if len({part[-1 - n] for part in parts}) > 1), 0)
    return ["/".join(part[first : len(part) - num_last]) for part in parts]


def _read(name: str, folder: Path) -> Run:
    pictures = Generated(folder)
    scores = {}
    for path in sorted((folder / "scores").glob("*.json")):
        score = json.loads(path.read_text(encoding="utf-8"))
        _check_score(path, score, pictures)
        scores[score["metric"]] = score
    return Run(name, folder, read_manifest(folder), read_prompts(folder), pictures.units, scores)


def _check_score(path: Path, score: dict[str, Any], pictures: Generated) -> None:
    """A score that was taken of other images must not stand beside these."""
    if score["settings"]["pictures"] != fingerprint(pictures):
        raise ValueError(f"{path} is a score of other images than {pictures.name} has now: score them again")


@dataclass(frozen=True)
class Failure:
    """An image that GenEval judged wrong: the place of its unit, why, and boxes (x1, y1, x2, y2, score) by class."""

    unit: Unit
    tag: str
    caption: str
    reason: str
    boxes: dict[str, list[list[float]]]


def failures(run: Run, metric: str, num_per_tag: int) -> list[Failure]:
    """The first wrong images of each tag, of different prompts."""
    units = {(unit.prompt, unit.image): unit for unit in run.units}
    found: dict[str, list[Failure]] = {}
    for row in run.rows(metric):
        tag = run.prompts[row["prompt"]]["tag"]
        chosen = found.setdefault(tag, [])
        shown = {failure.unit.prompt for failure in chosen}
        if not row["correct"] and len(chosen) < num_per_tag and row["prompt"] not in shown:
            unit = units[row["prompt"], row["image"]]
            chosen.append(Failure(unit, tag, run.caption(row["prompt"]), row["reason"], row["details"]))
    return [failure for chosen in found.values() for failure in chosen]
