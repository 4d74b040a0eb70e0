"""From tensors to a whole checkpoint, as one save of torch.distributed.checkpoint (DCP).

DCP's steps are all that is needed to agree: plans are gathered by the first rank, which then makes the folder; every
rank writes its file and returns the extents, CRC-32s included; the first rank, which gets them only when every rank
has succeeded, seals the checkpoint. An error in any step on any rank reaches all. DCP also sees to it that a range
that several ranks own (HSDP's replicas) is written by one of them.
"""

import concurrent.futures
import os
import pickle
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megadit import checksums
from megadit.files import PARTIAL
from megadit.training.checkpoint import extents, folders
from megadit.training.checkpoint.folders import METADATA, Header

SYNC_BYTES = 2**27  # written before the disk is told to take them: it works meanwhile, and the last sync is short


class Writer(dcp.StorageWriter):
    """Writes one checkpoint into `folder`: under a temporary name until every rank is done.

    `header` lists no files yet; on the first rank it is complete after the save. `progress` is called for every
    tensor that is written, in the thread that saves.
    """

    def __init__(self, folder: Path, header: Header, progress: Callable[[], object]) -> None:
        self.final = folder / folders.folder_name(header.images_seen)
        self.partial = folder / f"{PARTIAL}{self.final.name}"
        self.header = header
        self.wrote_own_file = False
        self._progress = progress
        self._names: list[str] = []  # of the files of all ranks, on the first one

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Touches no disk: the first rank makes the folder, once all plans are there."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank, before any writes: the name of each rank's file."""
        folders.make_partial(self.partial)
        self._names = [f"rank-{rank}.bin" for rank in range(len(plans))]
        return [replace(plan, storage_data=name) for plan, name in zip(plans, self._names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """On every rank: the ranges of its plan, one after the other, in one file. Raises OSError."""
        results: list[WriteResult] = []
        syncs: list[concurrent.futures.Future[None]] = []
        end = 0
        path = self.partial / plan.storage_data
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(extents.NUM_THREADS + 1) as pool:
            for item in plan.items:
                values = planner.resolve_data(item)
                assert isinstance(values, torch.Tensor) and values.dtype == torch.float32
                data = values.detach().cpu().view(torch.uint8)
                extent = extents.write(file.fileno(), path.name, end, data, pool)
                results.append(WriteResult(item.index, extent.num_bytes, extent))
                end += extent.num_bytes
                self._progress()
                if end >= SYNC_BYTES * (len(syncs) + 1):
                    syncs.append(pool.submit(os.fdatasync, file.fileno()))
            for sync in syncs:
                sync.result()
            os.fsync(file.fileno())
        self.wrote_own_file = True
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when every rank has written."""
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        index = pickle.dumps(metadata)
        folders.write_synced(self.partial / METADATA, index)
        sizes = Counter(dict.fromkeys(self._names, 0) | {METADATA: len(index)})
        for extent in metadata.storage_data.values():
            sizes[extent.file] += extent.num_bytes
        self.header = replace(self.header, files=dict(sizes), index_crc=checksums.crc32(index))
        folders.seal(self.partial, self.header)

    # What DCP asks of a writer besides

    def set_up_storage_writer(self, *_: Any, **__: Any) -> None:
        pass

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return True
