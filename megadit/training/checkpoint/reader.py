"""From a checkpoint to tensors, as one load of torch.distributed.checkpoint (DCP), which finds the ranges to read.

Reading verifies: every block is compared with its CRC-32 on the way into the memory of the tensor.
"""

import pickle
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megadit import checksums
from megadit.training.checkpoint import extents, folders
from megadit.training.checkpoint.extents import Extent
from megadit.training.checkpoint.folders import METADATA, DamageError, Header


def find_damage(path: Path, part: int = 0, num_parts: int = 1, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None.

    Args:
        part: read every `num_parts`-th file only, from this one on, so that ranks can share the work.
        contents: compare CRCs, which reads every byte; otherwise only sizes.

    Raises:
        CheckpointError: it may well be whole, but not for this version.
    """
    try:
        header = folders.checked_header(path)
        if contents:
            mine = sorted(header.files)[part::num_parts]
            stored: dict[Any, Extent] = _read_index(path, header).storage_data
            extents.verify(path, [extent for extent in stored.values() if extent.file in mine])
    except DamageError as error:
        return str(error)
    return None


def _read_index(path: Path, header: Header) -> Metadata:
    """DCP's metadata: which ranges there are, each with its extent."""
    content = (path / METADATA).read_bytes()
    if checksums.crc32(content) != header.index_crc:
        raise DamageError(f"{METADATA} has changed (its CRC-32 differs)")
    return pickle.loads(content)


class Reader(dcp.StorageReader):
    """Reads the checkpoint at `path`, of which it has looked at everything but the contents of the data files.

    Raises DamageError, and CheckpointError where it is not for this version.
    """

    def __init__(self, path: Path) -> None:
        self.header = folders.checked_header(path)
        self._path = path
        self._index = _read_index(path, self.header)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """On every rank: the ranges of its plan. Raises DamageError and OSError."""
        extents.read(self._path, [self._read_of(item, planner) for item in plan.items])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_of(self, item: ReadItem, planner: LoadPlanner) -> extents.Read:
        target = planner.resolve_tensor(item).detach().view(torch.uint8)
        extent: Extent = self._index.storage_data[item.storage_index]
        (num_elements,), (first,) = item.lengths, item.storage_offsets
        start = target.numel() // num_elements * first
        return extents.Read(extent, start, start + target.numel(), target)

    # What DCP asks of a reader besides

    def set_up_storage_reader(self, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()
