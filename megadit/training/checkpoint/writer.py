"""From tensors to a whole checkpoint, as one save of torch.distributed.checkpoint (DCP).

DCP's steps are all that is needed to agree: plans are gathered by the first rank, which then makes the folder; every
rank writes its file and returns its size and CRC-32 with the results; the first rank, which gets them only when every
rank has succeeded, seals the checkpoint. An error in any step on any rank reaches all. DCP also sees to it that a
range that several ranks own (HSDP's replicas) is written by one of them.
"""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megadit.training.checkpoint import files
from megadit.training.checkpoint.files import Header

DATA_SUFFIX = ".distcp"
BUFFER_BYTES = 2**17


class Writer(dcp.FileSystemWriter):
    """Writes one checkpoint into `folder`: under a temporary name until every rank is done.

    `header` lists no files yet; on the first rank it is complete after the save.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self.final = folder / files.folder_name(header.images_seen)
        self.partial = folder / f"{files.PARTIAL}{self.final.name}"
        self.header = header
        super().__init__(self.partial, single_file_per_rank=True, sync_files=True)
        self._sums: dict[str, list[int]] = {}
        self.fs = _CheckedFiles(self._sums)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Touches no disk: the first rank makes the folder, once all plans are there."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank, before any writes."""
        files.make_partial(self.partial)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """On every rank. Raises OSError where the disk is full: torch's zip writer says "unexpected pos 704 vs 598"."""
        try:
            results = super().write_data(plan, planner).value()
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None
        done: Future[list[WriteResult]] = Future()
        done.set_result(_Written(results, self._sums))
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when every rank has written."""
        super().finish(metadata, results)
        sums = {name: entry for part in results if isinstance(part, _Written) for name, entry in part.sums.items()}
        index = self.partial / files.METADATA
        sums[index.name] = [index.stat().st_size, files.crc32(index)]
        self.header = replace(self.header, files=sums)
        files.seal(self.partial, self.header)


class _Written(list[WriteResult]):
    """What one rank wrote, with size and CRC-32 of its files."""

    def __init__(self, results: list[WriteResult], sums: dict[str, list[int]]) -> None:
        super().__init__(results)
        self.sums = sums

    def __reduce__(self) -> tuple[Any, ...]:
        return _Written, (list(self), self.sums)


class _CheckedFiles(FileSystem):
    """The file system, noting [size, CRC-32] of each file that is written."""

    def __init__(self, sums: dict[str, list[int]]) -> None:
        self._sums = sums

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", mode
        file = CheckedFile(path, "w")
        if Path(path).suffix != DATA_SUFFIX:
            with file:  # DCP syncs its index without flushing it
                yield file
            return
        with io.BufferedWriter(file, BUFFER_BYTES) as stream:  # torch.save makes 26 writes for a tensor
            yield stream
        self._sums[Path(path).name] = [file.num_bytes, file.crc]


class CheckedFile(io.FileIO):
    """A file that counts what it is given: reading it again for its CRC would take as long as writing it."""

    num_bytes = 0
    crc = 0

    def write(self, data: Any) -> int:
        """All of `data`. Raises OSError when the disk is full."""
        rest = memoryview(data).cast("B")
        length = len(rest)
        self.crc = zlib.crc32(rest, self.crc)
        while rest:
            rest = rest[super().write(rest) :]
        self.num_bytes += length
        return length
