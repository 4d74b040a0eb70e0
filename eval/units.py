"""A folder of generated images on disk: manifest.json, prompts.jsonl, images/ and the lists of finished units.

A unit is one image: (prompt number, image number). units/rank-R-of-D.jsonl has a line for each that is finished; each
rank appends to a file of its own. A unit is finished when its line is on disk, and its image was there before.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.files import PARTIAL, write_text
from megadit.journal import read_lines

PROMPTS_PER_FOLDER = 1000
JOURNAL = "units"  # the folder of the lists
FREE_KEYS = ("versions",)  # of the manifest: what may change between a job and its continuation


@dataclass(frozen=True)
class Unit:
    """One generated image and what it must contain."""

    prompt: int
    image: int
    path: Path
    sha256: str


def image_path(folder: Path, prompt: int, image: int) -> Path:
    """Where the image with index `image` of the prompt with index `prompt` is."""
    return folder / "images" / f"{prompt // PROMPTS_PER_FOLDER:06d}" / f"{prompt:06d}-{image:02d}.png"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest. Raises ValueError where there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a folder of generated images: it has no manifest.json")
    return json.loads(path.read_text(encoding="utf-8"))


def read_prompts(folder: Path) -> list[dict[str, Any]]:
    """The lines of prompts.jsonl, by index: {"index", "prompt", ...metadata}."""
    with (folder / "prompts.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def begin(folder: Path, manifest: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]) -> None:
    """Write manifest and prompts into a new folder, or check that it holds this very job.

    Raises ValueError that names the keys which differ, and for a folder with something else in it.
    """
    if (folder / "manifest.json").is_file():
        _check_same_job(folder, manifest)
        return
    begun = {"prompts.jsonl", f"{PARTIAL}prompts.jsonl", f"{PARTIAL}manifest.json"}  # all that a kill can leave here
    if folder.exists() and {path.name for path in folder.iterdir()} - begun:
        raise ValueError(f"{folder} has files but no manifest.json: give a new folder, or one of the same job")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "prompts.jsonl", "".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")  # last: with it the folder is a job


def _check_same_job(folder: Path, manifest: Mapping[str, Any]) -> None:
    there, now = read_manifest(folder), json.loads(json.dumps(manifest))
    differ = [
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*there, *now} - {*FREE_KEYS})
        if there.get(key) != now.get(key)
    ]
    if differ:
        raise ValueError(
            f"{folder} holds images of another job ({'; '.join(differ)}); continue that one as it was, "
            "or give another folder"
        )


def finished(folder: Path) -> dict[tuple[int, int], str]:
    """The SHA-256 of each finished unit, by (prompt, image)."""
    return {(unit["prompt"], unit["image"]): unit["sha256"] for unit in read_lines(folder / JOURNAL)}


def complete(folder: Path) -> list[Unit]:
    """Every unit that the manifest asks for, in order. Raises ValueError where one is missing."""
    manifest, prompts = read_manifest(folder), read_prompts(folder)
    digests = finished(folder)
    units, missing = [], []
    for prompt in range(len(prompts)):
        for image in range(manifest["images_per_prompt"]):
            path = image_path(folder, prompt, image)
            if (prompt, image) in digests and path.is_file():
                units.append(Unit(prompt, image, path, digests[prompt, image]))
            else:
                missing.append(path.name)
    if len(units) != manifest["num_units"]:
        which = f", the first that is missing is {missing[0]}" if missing else ""
        raise ValueError(
            f"{folder} is incomplete: {len(units)} of {manifest['num_units']} images are there{which}; "
            "`megadit eval generate` goes on where it stopped"
        )
    return units
