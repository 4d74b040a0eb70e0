"""Where `megadit train --from-weights` finds weights: a run, a published file, a model folder, one of diffusers."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megadit.interop.commands import WEIGHTS
from megadit.interop.layouts import from_diffusers
from megadit.interop.published import SUFFIXES, read_published
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe
from megadit.training import checkpoint, run_folder
from megadit.training.checkpoint.folders import HEADER
from megadit.training.from_weights import Weights, WeightSource

ALLOWED = (
    "the folder of a run or of a checkpoint, a published checkpoint (.pt, .pth, .safetensors), a folder that "
    "load-published wrote, or one of diffusers"
)


def source_of(place: str, kind: str | None) -> WeightSource:
    """The weights `kind` ("weight" or an average's name; None: the first average) at `place`."""
    return WeightSource(place, kind, lambda recipe: _read(Path(place), kind, recipe))


def _read(place: Path, kind: str | None, recipe: Recipe) -> Weights:
    if place.suffix in SUFFIXES:
        return _of_file(place, kind)
    if (place / HEADER).is_file():
        return _of_checkpoint(place, kind)
    if (place / "checkpoints").is_dir():
        newest = checkpoint.newest_valid(place / "checkpoints")
        if newest is None:
            raise ValueError(f"--from-weights {place}: the run has no checkpoint yet")
        return _of_checkpoint(newest, kind)
    if (place / WEIGHTS).is_file():
        _require_no_choice(place, kind)
        table = build_table(run_folder.load_recipe(place))
        multipliers = {spec.name: spec.multiplier for spec in table}
        return _of_tensors(load_file(place / WEIGHTS), _sha256(place / WEIGHTS), multipliers=multipliers)
    for folder in (place / "transformer", place):
        if (folder / "config.json").is_file() and (files := sorted(folder.glob("*.safetensors"))):
            _require_no_choice(place, kind)
            theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
            return _of_tensors(from_diffusers(recipe.model, theirs), _sha256(*files))
    raise ValueError(f"--from-weights {place}: allowed: {ALLOWED}")


def _of_checkpoint(path: Path, kind: str | None) -> Weights:
    header = checkpoint.read_header(path)
    kinds = ["weight", *header.averages]
    chosen = kind or next(iter(header.averages), "weight")
    if chosen not in kinds:
        raise ValueError(f"--weights {chosen}: {path} has {', '.join(kinds)}")
    rows = json.loads((path.parents[1] / "parameters.json").read_text())
    return Weights(
        kind=chosen,
        sha256=_sha256(path / HEADER),  # it has the checksums of all files
        shapes=header.shapes,
        multipliers={row["name"]: row["multiplier"] for row in rows},
        path=path,
    )


def _of_file(path: Path, kind: str | None) -> Weights:
    if not path.is_file():
        raise ValueError(f"--from-weights {path}: there is no such file")
    if kind not in (None, "weight"):
        raise ValueError(f"--weights {kind}: of a published checkpoint there is its average, the default, or weight")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            if "checkpoints" in (file.metadata() or {}):
                raise ValueError(
                    f"--from-weights {path}: `megadit checkpoint` wrote this file, which does not say how the recipe "
                    "scales its readout: give the run instead"
                )
    tensors = read_published(path, "raw" if kind == "weight" else "ema")
    return _of_tensors(tensors, _sha256(path), kind or "average")


def _of_tensors(
    tensors: Mapping[str, Tensor], sha256: str, kind: str = "weight", multipliers: Mapping[str, float] | None = None
) -> Weights:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return Weights(kind, sha256, shapes, multipliers or {}, tensors=tensors)


def _require_no_choice(place: Path, kind: str | None) -> None:
    if kind not in (None, "weight"):
        raise ValueError(f"--weights {kind}: {place} has one set of weights")


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
