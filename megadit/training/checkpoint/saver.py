"""Saving beside the training loop: the loop stands still while the state is copied, not while it is written."""

import logging
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megadit.data.storage import StorageError
from megadit.engines.base import Engine
from megadit.recipe import Recipe
from megadit.training.checkpoint import files
from megadit.training.checkpoint.copies import Copies
from megadit.training.checkpoint.files import FORMAT, CheckpointError, Header
from megadit.training.checkpoint.loading import newest_valid, state_of
from megadit.training.checkpoint.writer import Writer
from megadit.training.ema import Averages
from megadit.training.flat_range import FlatRange
from megadit.training.ranks import on_first_rank, rank

LONGEST_WRITE = timedelta(days=1)  # ranks wait for the slowest writer and, in the next save, for rank 0's copy to S3
logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run into RUN/checkpoints; a context, which ends when the last one is written.

    Every method is called by all ranks together. With `checkpoints.asynchronous`, `save` copies this rank's state to
    buffers in the memory of the CPU, made at the first save, and a thread writes them while training goes on. The
    thread talks to those of the other ranks over a gloo group of its own: two threads that share one abort it.
    """

    def __init__(self, run: Path, recipe: Recipe, engine: Engine, averages: Averages) -> None:
        self._folder = run / "checkpoints"
        self._settings = recipe.checkpoints
        self._engine, self._averages = engine, averages
        self._group = dist.new_group(backend="gloo", timeout=LONGEST_WRITE) if dist.is_initialized() else None
        self._copies = Copies(self._settings.copy_url, recipe) if self._settings.copy_url else None
        self._copy_failure: StorageError | None = None  # of the newest checkpoint, on rank 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
            if error is None:
                on_first_rank(self._require_copy)
        except Exception as failure:
            if error is None:
                raise
            logger.error("%s", failure)  # the error that ends the run is the other one
        finally:
            self._thread.shutdown()

    def newest(self) -> Path | None:
        """The newest whole checkpoint of the run, brought here from its copies when the run has none at all."""
        found = newest_valid(self._folder)
        if found is None and self._copies is not None:
            copies = self._copies
            found = on_first_rank(lambda: copies.fetch_newest(self._folder))
        return found

    def save(self, images_seen: int, num_steps: int) -> None:
        """Save the state of this moment.

        Raises CheckpointError on every rank when any rank cannot write this checkpoint or could not write the one
        before; nothing half-written stays.
        """
        started = time.perf_counter()
        self.wait()
        header = Header(
            format=FORMAT,
            images_seen=images_seen,
            num_steps=num_steps,
            shapes={name: list(shard.shape) for name, shard in self._engine.shards.items()},
            averages=list(self._averages.by_name()),
            files={},
        )
        writer = Writer(self._folder, header)
        state = state_of(self._engine, self._averages)
        if not self._settings.asynchronous:
            self._write(state, writer, started)
            return
        staged = self._stage(state)
        stall = time.perf_counter() - started
        self._in_flight = self._thread.submit(self._write, staged, writer, time.perf_counter(), stall)

    def wait(self) -> None:
        """Return when nothing is being written. Raises CheckpointError as `save` does."""
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def _require_copy(self) -> None:
        if self._copy_failure is not None:
            raise CheckpointError(
                f"the last checkpoint could not be copied: {self._copy_failure}; it is whole in {self._folder}"
            )

    def _stage(self, state: Mapping[str, FlatRange]) -> dict[str, FlatRange]:
        """A copy of the state in buffers that are used again; the thread has done with them."""
        on_gpu = self._engine.device.type == "cuda"
        if not self._buffers:
            self._buffers = {
                key: torch.empty(part.plain.shape, dtype=part.dtype, pin_memory=on_gpu) for key, part in state.items()
            }
        torch._foreach_copy_(
            [self._buffers[key] for key in state], [part.plain for part in state.values()], non_blocking=True
        )
        if on_gpu:
            torch.cuda.synchronize()
        return {key: FlatRange.of(self._buffers[key], part.offset, part.total) for key, part in state.items()}

    def _write(
        self, state: Mapping[str, FlatRange], writer: Writer, started: float, stall: float | None = None
    ) -> None:
        """Write, publish and prune. `stall` is how long the loop stood still, None for the whole time."""
        try:
            dcp.save(dict(state), storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except (OSError, CheckpointException) as error:
            if rank() == 0:
                shutil.rmtree(writer.partial, ignore_errors=True)
            last_good = next(iter(files.newest_first(self._folder)), "none")
            raise CheckpointError(
                f"cannot write checkpoint {writer.final}: {_first_cause(error)}; newest whole checkpoint: {last_good}"
            ) from None
        if rank() == 0:
            seconds = time.perf_counter() - started
            logger.info(
                "checkpoint %s: %.3g GB written in %.2f s, for which training stood still for %.2f s",
                writer.final.name,
                writer.header.num_bytes / 1e9,
                seconds,
                seconds if stall is None else stall,
            )
            files.prune(self._folder, self._settings.keep, self._settings.keep_every_images)
            self._copy(writer.final)

    def _copy(self, path: Path) -> None:
        """A copy that fails is no reason to stop while the next one may succeed: only the last one is an error."""
        if self._copies is None:
            return
        try:
            self._copies.send(path)
            self._copy_failure = None
        except StorageError as error:
            logger.warning("checkpoint %s could not be copied: %s", path.name, error)
            self._copy_failure = error


def _first_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        number, (cause, _) = next(iter(sorted(error.failures.items())))
        return f"rank {number}: {cause}"
    return str(error)
