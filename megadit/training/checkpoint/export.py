"""Files for inference: one set of weights of a checkpoint, or the mean over several, as safetensors.

The names are ours, as in the state dict of the model; buffers are in it, multipliers of readouts are not (they follow
from the recipe). `megadit interop export-diffusers` makes folders that other programs load.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from megadit import models
from megadit.models import ModelConfig
from megadit.training import run_folder
from megadit.training.checkpoint import folders
from megadit.training.checkpoint.folders import CheckpointError
from megadit.training.checkpoint.loading import newest_valid, read_tensors
from megadit.training.checkpoint.reader import find_damage

Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(run: Path, out: Path, weights: str | None, dtype: Dtype, images: int | None) -> str:
    """Write weights of a checkpoint to the safetensors file `out`. Returns what was written, in words.

    Args:
        weights: "weight" or the name of an average; None for the first average, or the weights if there is none.
        images: the checkpoint of so many images seen; None for the newest whole one.

    Raises:
        CheckpointError: there is no such checkpoint or weights, or the checkpoint is damaged.
    """
    if images is None:
        path = newest_valid(run / "checkpoints")
        if path is None:
            raise CheckpointError(f"{run} has no checkpoint yet")
    else:
        (path,) = _whole(run, [images])
    kind = _kind(path, weights)
    return _write(out, read_tensors(path, kind), dtype, kind, [path])


def average(run: Path, out: Path, weights: str | None, dtype: Dtype, images: Sequence[int]) -> str:
    """Write the mean, taken in fp32, of the weights of several checkpoints to the safetensors file `out`.

    Args: see `convert`; without `images` all checkpoints of the run. Raises CheckpointError as it does, and where there
    are fewer than two checkpoints.
    """
    paths = _whole(run, images)
    if len(paths) < 2:
        raise CheckpointError(f"an average needs at least two checkpoints; given: {_names(paths)}")
    kind = _kind(paths[0], weights)
    mean = read_tensors(paths[0], kind)
    for number, path in enumerate(paths[1:], start=2):
        for name, values in read_tensors(path, kind).items():
            mean[name].lerp_(values, 1 / number)
    return _write(out, mean, dtype, kind, paths)


def _whole(run: Path, images: Sequence[int]) -> list[Path]:
    """The checkpoints that are asked for, each read to the last byte."""
    paths = folders.existing(run, images)
    for path in paths:
        if damage := find_damage(path):
            raise CheckpointError(f"checkpoint {path} is damaged: {damage}")
    return paths


def _kind(path: Path, weights: str | None) -> str:
    return weights or next(iter(folders.read_header(path).averages), "weight")


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"


def _model_of(paths: Sequence[Path]) -> ModelConfig:
    """The settings of the model that the checkpoints have in common."""
    found = [run_folder.recipe_of(path).model for path in paths]
    if other := next((path for path, model in zip(paths, found, strict=True) if model != found[0]), None):
        raise CheckpointError(
            f"{paths[0].name} and {other.name} are of stages with other settings of the model, such as the resolution: "
            "give checkpoints of one stage"
        )
    return found[0]


def _write(out: Path, tensors: Mapping[str, Tensor], dtype: Dtype, kind: str, paths: Sequence[Path]) -> str:
    with torch.device("meta"):
        model = models.build(_model_of(paths))
    state = {name: tensors.get(name, value) for name, value in model.state_dict().items()}
    metadata = {"weights": kind, "checkpoints": json.dumps([path.name for path in paths]), "format": "pt"}
    out.parent.mkdir(parents=True, exist_ok=True)
    floats = {name: value.to(DTYPES[dtype]) for name, value in state.items() if value.is_floating_point()}
    save_file(state | floats, out, metadata)
    return f"{kind} of {_names(paths)} in {dtype}"
