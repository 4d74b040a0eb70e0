"""Checkpoints: one format for every engine and world size, whole or not there.

    RUN/checkpoints/images-0000012800/
        checkpoint.json    images seen, parameter shapes, size and CRC-32 of every file, its own included: written last
        .metadata, *.distcp    torch.distributed.checkpoint: flat fp32 ranges under KIND/PARAMETER

KIND is `weight`, `exp_avg`, `exp_avg_sq` or the name of an average. A checkpoint is written under a temporary name,
synced and renamed, so a folder with the final name is complete; what happens to it afterwards is found by the CRCs on
loading, and the one before is used. The newest is found by name: nothing points to it.
"""

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megadit.engines.base import Engine
from megadit.training.ema import Averages
from megadit.training.flat_range import FlatRange
from megadit.training.ranks import on_every_rank, on_first_rank, quiet_single_process, rank, world_size

FORMAT = 1
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used."""


@dataclass(frozen=True)
class Header:
    """What checkpoint.json says."""

    format: int
    images_seen: int
    num_steps: int
    shapes: dict[str, list[int]]  # of the parameters, by name
    averages: list[str]
    files: dict[str, list[int]]  # name -> [bytes, CRC-32]


class _Writer(dcp.FileSystemWriter):
    """Reports a full disk as such: torch's zip writer hides it behind "unexpected pos 704 vs 598"."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None


def save(folder: Path, engine: Engine, averages: Averages, images_seen: int, num_steps: int, keep: int) -> Path:
    """Write the checkpoint of this moment into `folder` and remove all but the newest `keep`.

    Raises CheckpointError on every rank when any rank cannot write; nothing half-written stays.
    """
    final = folder / f"images-{images_seen:010d}"
    partial = folder / f".partial-{final.name}"
    state = _state(engine, averages)
    try:
        on_first_rank(lambda: _make_empty(partial))
        with quiet_single_process():
            dcp.save(
                state,
                storage_writer=_Writer(partial, sync_files=True, single_file_per_rank=True),
                no_dist=world_size() == 1,
            )
        files = {n: entry for part in on_every_rank(lambda: _own_files(partial)) for n, entry in part.items()}
        header = Header(
            format=FORMAT,
            images_seen=images_seen,
            num_steps=num_steps,
            shapes={name: list(shard.shape) for name, shard in engine.shards.items()},
            averages=list(averages.by_name()),
            files=files,
        )
        on_first_rank(lambda: _publish(partial, final, header))
    except (OSError, CheckpointException) as error:
        reason = _first_cause(error)
        last_good = on_first_rank(lambda: _after_failure(folder, partial))
        raise CheckpointError(
            f"cannot write checkpoint {final}: {reason}; newest whole checkpoint: {last_good}"
        ) from None
    on_first_rank(lambda: _prune(folder, keep))
    return final


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint whose files are whole; every newer one that is not is named in the log.

    None where there are no checkpoints. Raises CheckpointError when there are some and none is whole.
    """
    return on_first_rank(lambda: _newest_valid(folder))


def load(path: Path, engine: Engine, averages: Averages) -> Header:
    """Restore weights, moments, averages and the step count from a checkpoint of any engine and world size."""
    header = read_header(path)
    _check_same_model(path, header, engine)
    with quiet_single_process():
        dcp.load(_state(engine, averages), storage_reader=dcp.FileSystemReader(path), no_dist=world_size() == 1)
    engine.weights_written()
    engine.set_num_steps(header.num_steps)
    return header


def read_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """All tensors of one kind ("weight" or an average's name), whole, in one process, by parameter name."""
    header = read_header(path)
    if kind not in ("weight", *header.averages):
        raise CheckpointError(f"{path} holds no weights {kind!r}; there are: weight, {', '.join(header.averages)}")
    values = {name: torch.empty(shape) for name, shape in header.shapes.items()}
    ranges = {f"{kind}/{n}": FlatRange.of(v.view(-1), 0, v.numel()) for n, v in values.items()}
    with quiet_single_process():
        dcp.load(ranges, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return values


def read_header(path: Path) -> Header:
    """What checkpoint.json says. Raises OSError and ValueError when it cannot be read or has changed."""
    sealed = json.loads((path / "checkpoint.json").read_text())
    if not isinstance(sealed, dict) or sealed.get("crc32") != _crc32_of_tree(sealed.get("header")):
        raise ValueError(f"{path / 'checkpoint.json'} has changed: its CRC-32 differs")
    tree = sealed["header"]
    if tree.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {tree.get('format')}, this version reads {FORMAT}")
    return Header(**tree)


def find_damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        header = read_header(path)
    except CheckpointError:  # whole, but not for this version
        raise
    except (OSError, ValueError) as error:
        return f"checkpoint.json cannot be read ({error})"
    for name, (num_bytes, crc) in header.files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != num_bytes:
            return f"{name} has {file.stat().st_size} bytes instead of {num_bytes}"
        if _crc32(file) != crc:
            return f"{name} has changed (its CRC-32 differs)"
    return None


def _state(engine: Engine, averages: Averages) -> dict[str, Any]:
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


def _make_empty(partial: Path) -> None:
    for left_over in partial.parent.glob(".partial-*"):  # by a run that was killed while it wrote
        shutil.rmtree(left_over)
    partial.mkdir(parents=True)


def _own_files(partial: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of the files that this rank wrote; rank 0 answers for the metadata too."""
    files = list(partial.glob(f"__{rank()}_*.distcp"))
    if rank() == 0:
        files.append(partial / ".metadata")
    return {file.name: [file.stat().st_size, _crc32(file)] for file in files}


def _publish(partial: Path, final: Path, header: Header) -> None:
    with (partial / "checkpoint.json").open("w") as file:
        json.dump({"crc32": _crc32_of_tree(asdict(header)), "header": asdict(header)}, file)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same moment, which a resume went back before
    partial.rename(final)
    _sync_folder(final.parent)


def _after_failure(folder: Path, partial: Path) -> str:
    shutil.rmtree(partial, ignore_errors=True)
    return str(next(iter(_newest_first(folder)), "none"))


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("images-*"), reverse=True)


def _newest_valid(folder: Path) -> Path | None:
    damage = None
    for path in _newest_first(folder):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("checkpoint %s is damaged: %s; trying the one before", path, damage)
    if damage is None:
        return None
    raise CheckpointError(
        f"no checkpoint in {folder} is whole (the oldest: {damage}); restore one, or start anew in another --run"
    )


def _prune(folder: Path, keep: int) -> None:
    for path in _newest_first(folder)[keep:]:
        shutil.rmtree(path)


def _check_same_model(path: Path, header: Header, engine: Engine) -> None:
    expected = {name: list(shard.shape) for name, shard in engine.shards.items()}
    wrong = sorted(n for n in expected.keys() | header.shapes.keys() if expected.get(n) != header.shapes.get(n))
    if wrong:
        shown = ", ".join(f"{n} ({header.shapes.get(n)} there, {expected.get(n)} here)" for n in wrong[:3])
        raise CheckpointError(f"{path} is of another model: {len(wrong)} parameters differ: {shown}")


def _first_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        number, (cause, _) = next(iter(sorted(error.failures.items())))
        return f"rank {number}: {cause}"
    return str(error)


def _crc32_of_tree(tree: Any) -> int:
    return zlib.crc32(json.dumps(tree).encode())


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            crc = zlib.crc32(chunk, crc)
    return crc


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
