"""Reading checkpoints: into an engine of any kind on any number of ranks, or tensors by name."""

import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megadit.engines.base import Engine
from megadit.training.checkpoint import files
from megadit.training.checkpoint.files import CheckpointError, Header
from megadit.training.ema import Averages
from megadit.training.flat_range import FlatRange
from megadit.training.ranks import on_every_rank, on_first_rank, rank, world_size

logger = logging.getLogger(__name__)
# Here once and not around the calls: those of a thread would change the filters of the others.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module=r"torch\.distributed\.checkpoint")


def state_of(engine: Engine, averages: Averages) -> dict[str, FlatRange]:
    """KIND/PARAMETER -> the range of it that this rank holds, sharing memory with the engine."""
    moments = engine.moments()
    kinds: dict[str, Mapping[str, Tensor]] = {
        "weight": {name: shard.values for name, shard in engine.shards.items()},
        "exp_avg": {name: first for name, (first, _) in moments.items()},
        "exp_avg_sq": {name: second for name, (_, second) in moments.items()},
        **averages.by_name(),
    }
    return {
        f"{kind}/{name}": FlatRange.of(values, engine.shards[name].offset, math.prod(engine.shards[name].shape))
        for kind, tensors in kinds.items()
        for name, values in tensors.items()
    }


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint whose files are whole; every newer one that is not is named in the log.

    Called by all ranks together, which share the reading. None where there are no checkpoints. Raises CheckpointError
    when there are some and none is whole.
    """
    damage = None
    for path in on_first_rank(lambda: files.newest_first(folder)):
        damage = _damage_found_by_any_rank(path)
        if damage is None:
            return path
        if rank() == 0:
            logger.warning("checkpoint %s is damaged: %s; trying the one before", path, damage)
    if damage is None:
        return None
    raise CheckpointError(
        f"no checkpoint in {folder} is whole (the oldest: {damage}); restore one, or start anew in another --run"
    )


def _damage_found_by_any_rank(path: Path) -> str | None:
    found = on_every_rank(lambda: files.find_damage(path, rank(), world_size()))
    return next(filter(None, found), None)


def load(path: Path, engine: Engine, averages: Averages) -> Header:
    """Restore weights, moments, averages and the step count from a checkpoint of any engine and world size."""
    header = files.read_header(path)
    _check_same_model(path, header, engine)
    dcp.load(state_of(engine, averages), storage_reader=dcp.FileSystemReader(path), no_dist=world_size() == 1)
    engine.weights_written()
    engine.set_num_steps(header.num_steps)
    return header


def read_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """All tensors of one kind ("weight" or an average's name), whole, in one process, by parameter name."""
    header = files.read_header(path)
    if kind not in ("weight", *header.averages):
        raise CheckpointError(f"{path} holds no weights {kind!r}; there are: weight, {', '.join(header.averages)}")
    values = {name: torch.empty(shape) for name, shape in header.shapes.items()}
    ranges = {f"{kind}/{n}": FlatRange.of(v.view(-1), 0, v.numel()) for n, v in values.items()}
    dcp.load(ranges, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return values


def _check_same_model(path: Path, header: Header, engine: Engine) -> None:
    expected = {name: list(shard.shape) for name, shard in engine.shards.items()}
    wrong = sorted(n for n in expected.keys() | header.shapes.keys() if expected.get(n) != header.shapes.get(n))
    if wrong:
        shown = ", ".join(f"{n} ({header.shapes.get(n)} there, {expected.get(n)} here)" for n in wrong[:3])
        raise CheckpointError(f"{path} is of another model: {len(wrong)} parameters differ: {shown}")
