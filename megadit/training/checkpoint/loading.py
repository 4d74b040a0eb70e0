"""Reading checkpoints: into an engine of any kind on any number of ranks, or tensors by name."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megadit.distributed import ALONE, Topology
from megadit.engines.base import Engine, Shard
from megadit.training.checkpoint import folders
from megadit.training.checkpoint.flat_range import FlatRange
from megadit.training.checkpoint.folders import CheckpointError, DamageError, Header
from megadit.training.checkpoint.reader import Reader, find_damage
from megadit.training.ema import Averages

Used = TypeVar("Used")
logger = logging.getLogger(__name__)
# Here once and not around the calls: those of a thread would change the filters of the others.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module=r"torch\.distributed\.checkpoint")


def state_of(engine: Engine, averages: Averages) -> dict[str, FlatRange]:
    """KIND/PARAMETER -> the range of it that this rank holds, sharing memory with the engine."""
    states = engine.optimizer_state()
    kinds: dict[str, Mapping[str, Tensor]] = {
        "weight": {name: shard.values for name, shard in engine.shards.items()},
        **{slot: {name: state[slot] for name, state in states.items()} for slot in slots_of(engine)},
        **averages.by_name(),
    }
    return {
        f"{kind}/{name}": FlatRange.of(values, engine.shards[name].offset, math.prod(engine.shards[name].shape))
        for kind, tensors in kinds.items()
        for name, values in tensors.items()
    }


def slots_of(engine: Engine) -> list[str]:
    """The slots of the engine's optimizer; all parameters have the same."""
    return list(next(iter(engine.optimizer_state().values())))


def newest_valid(folder: Path, topology: Topology = ALONE) -> Path | None:
    """The newest checkpoint whose files are whole; every newer one that is not is named in the log.

    Called by all ranks together, which share the reading. None where there are no checkpoints. Raises CheckpointError
    when there are some and none is whole.
    """

    def verify(path: Path) -> None:
        found = topology.on_every(lambda: find_damage(path, topology.rank, topology.size))
        if damage := next(filter(None, found), None):
            raise DamageError(damage)

    paths = topology.on_first(lambda: folders.newest_first(folder))
    return _first_whole(paths, verify, topology)[0] if paths else None


def newest_complete(folder: Path, topology: Topology) -> Path | None:
    """As `newest_valid`, but only the sizes of files are looked at: for `load_or_before`, which looks at the rest."""

    def look(path: Path) -> None:
        if damage := find_damage(path, contents=False):
            raise DamageError(damage)

    def find() -> Path | None:
        paths = folders.newest_first(folder)
        return _first_whole(paths, look, ALONE)[0] if paths else None

    return topology.on_first(find)


def load_or_before(path: Path, engine: Engine, averages: Averages) -> tuple[Path, Header]:
    """`load` a checkpoint of a folder or, where reading shows that it is damaged, the newest whole one before it.

    Raises CheckpointError where none is.
    """
    newest_first = engine.topology.on_first(lambda: folders.newest_first(path.parent))
    before = [other for other in newest_first if other.name < path.name]
    return _first_whole([path, *before], lambda candidate: load(candidate, engine, averages), engine.topology)


def _first_whole(paths: Sequence[Path], use: Callable[[Path], Used], topology: Topology) -> tuple[Path, Used]:
    """The first checkpoint of which `use` does not raise DamageError, and its result; what is damaged is logged."""
    for path in paths:
        try:
            return path, use(path)
        except DamageError as error:
            damage = str(error)
            if topology.is_first:
                logger.warning("checkpoint %s is damaged: %s; trying the one before", path, damage)
    raise CheckpointError(
        f"no checkpoint in {path.parent} is whole (the oldest: {damage}); restore one, or start anew in another --run"
    )


def load(path: Path, engine: Engine, averages: Averages) -> Header:
    """Restore weights, optimizer state, averages and the step count from a checkpoint of any engine and world size.

    Verifies what it reads: raises DamageError on every rank, with a part of the state restored, when any finds damage.
    Raises CheckpointError when it is of another model.
    """
    reader = _first_error_for_all(lambda: Reader(path), engine.topology)
    header = reader.header
    _check_same_model(path, header, engine)
    _read(state_of(engine, averages), reader, no_dist=engine.topology.size == 1)
    engine.weights_written()
    engine.set_num_steps(header.num_steps)
    return header


def load_weights(path: Path, kind: str, shards: Mapping[str, Shard], topology: Topology) -> None:
    """Read one kind of weights into this rank's ranges of some parameters; all ranks together, as `load` does."""
    reader = _first_error_for_all(lambda: Reader(path), topology)
    ranges = {
        f"{kind}/{name}": FlatRange.of(shard.values, shard.offset, math.prod(shard.shape))
        for name, shard in shards.items()
    }
    _read(ranges, reader, no_dist=topology.size == 1)


def _first_error_for_all(function: Callable[[], Used], topology: Topology) -> Used:
    """The result on this rank of a function that every rank calls; the first rank's error on every rank."""
    results: list[Used] = []
    topology.on_every(lambda: results.append(function()))
    return results[0]


def read_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """All tensors of one kind ("weight" or an average's name), whole, in one process, by parameter name.

    Raises DamageError, and CheckpointError when it holds no such kind.
    """
    reader = Reader(path)
    header = reader.header
    if kind not in ("weight", *header.averages):
        raise CheckpointError(f"{path} holds no weights {kind!r}; there are: weight, {', '.join(header.averages)}")
    values = {name: torch.empty(shape) for name, shape in header.shapes.items()}
    ranges = {f"{kind}/{n}": FlatRange.of(v.view(-1), 0, v.numel()) for n, v in values.items()}
    _read(ranges, reader, no_dist=True)
    return values


def _read(state: dict[str, FlatRange], reader: Reader, no_dist: bool) -> None:
    """Raises DamageError where any rank found damage, otherwise the first error of any rank."""
    try:
        dcp.load(dict(state), storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:
        causes = [cause for _, (cause, _) in sorted(error.failures.items())]
        raise next((cause for cause in causes if isinstance(cause, DamageError)), causes[0]) from None


def _check_same_model(path: Path, header: Header, engine: Engine) -> None:
    expected = {name: list(shard.shape) for name, shard in engine.shards.items()}
    wrong = sorted(n for n in expected.keys() | header.shapes.keys() if expected.get(n) != header.shapes.get(n))
    if wrong:
        shown = ", ".join(f"{n} ({header.shapes.get(n)} there, {expected.get(n)} here)" for n in wrong[:3])
        raise CheckpointError(f"{path} is of another model: {len(wrong)} parameters differ: {shown}")
    if sorted(header.slots) != sorted(slots_of(engine)):
        raise CheckpointError(
            f"{path} has the state of another optimizer: {', '.join(header.slots)} there, "
            f"{', '.join(slots_of(engine))} here; go on with the optimizer that it was written with"
        )
