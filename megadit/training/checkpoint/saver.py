"""Saving beside the training loop: the loop stands still while the state is copied, not while it is written."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
from megadit.recipe import Recipe, Stage
from megadit.training.checkpoint import folders
from megadit.training.checkpoint.copies import Copies
from megadit.training.checkpoint.flat_range import FlatRange
from megadit.training.checkpoint.folders import FORMAT, CheckpointError, Header
from megadit.training.checkpoint.loading import slots_of, state_of
from megadit.training.checkpoint.writer import Writer
from megadit.training.ema import Averages
from megadit.training.watchdog import Watchdog

LONGEST_WRITE = timedelta(days=1)  # ranks wait for the slowest writer and for rank 0's copy to S3
POLL_SECONDS = 0.5
logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run into RUN/checkpoints; a context, which ends when the last one is written.

    Every method is called by all ranks together. A thread writes, and talks to those of the other ranks over a gloo
    group of its own: two threads that share one abort it. With `checkpoints.asynchronous`, `save` copies this rank's
    state to buffers in the memory of the CPU, made at the first save, and training goes on while they are written;
    otherwise `save` waits.

    Waiting for a write is no stall while bytes go to the disk or to the copy: the watchdog is told of them.
    """

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        engine: Engine,
        averages: Averages,
        watchdog: Watchdog | None = None,
        stage: Stage | None = None,
    ) -> None:
        self._folder = run / "checkpoints"
        self._settings = stage.recipe.checkpoints if stage else recipe.checkpoints
        self._engine, self._averages = engine, averages
        self._watchdog, self._stage = watchdog, stage
        self._group = dist.new_group(backend="gloo", timeout=LONGEST_WRITE) if engine.topology.joined else None
        self._copies = Copies(self._settings.copy_url, recipe) if self._settings.copy_url else None
        self._copy_failure: StorageError | None = None  # of the newest checkpoint
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: tuple[Future[None], Writer] | None = None
        self._num_pieces = 0  # of data that the thread has written or copied
        self._buffers: dict[str, Tensor] = {}

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
            if error is None and (self._stage is None or self._stage.is_last):
                self._require_copy()
        except Exception as failure:
            if error is None:
                raise
            logger.error("%s", failure)  # the error that ends the run is the other one
        finally:
            self._thread.shutdown()

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
            index_crc=0,
            slots=slots_of(self._engine),
            stage=self._stage.number if self._stage else 0,
        )
        writer = Writer(self._folder, header, self._count)
        state = state_of(self._engine, self._averages)
        if self._settings.asynchronous:
            state = self._copy_of(state)
            stall = time.perf_counter() - started
            self._in_flight = self._thread.submit(self._write, state, writer, time.perf_counter(), stall), writer
        else:
            self._in_flight = self._thread.submit(self._write, state, writer, started), writer
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written or copied. Raises CheckpointError as `save` does."""
        if self._in_flight is None:
            return
        (write, writer), self._in_flight = self._in_flight, None
        if self._watchdog is not None:
            _watch(self._watchdog, write, writer, lambda: self._num_pieces)
        write.result()

    def _count(self) -> None:
        self._num_pieces += 1

    def _require_copy(self) -> None:
        if self._copy_failure is not None:
            raise CheckpointError(
                f"the last checkpoint could not be copied: {self._copy_failure}; it is whole in {self._folder}"
            )

    def _copy_of(self, state: Mapping[str, FlatRange]) -> dict[str, FlatRange]:
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
        """Write, publish, prune and copy. `stall` is how long the loop stood still, None for the whole time."""
        try:
            dcp.save(dict(state), storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except (OSError, CheckpointException) as error:
            if self._engine.topology.is_first:
                shutil.rmtree(writer.partial, ignore_errors=True)
            last_good = next(iter(folders.newest_first(self._folder)), "none")
            raise CheckpointError(
                f"cannot write checkpoint {writer.final}: {_first_cause(error)}; newest whole checkpoint: {last_good}"
            ) from None
        if self._engine.topology.is_first:
            seconds = time.perf_counter() - started
            logger.info(
                "checkpoint %s: %.3g GB written in %.2f s, for which training stood still for %.2f s",
                writer.final.name,
                writer.header.num_bytes / 1e9,
                seconds,
                seconds if stall is None else stall,
            )
        self._copy_failure = self._engine.topology.on_first(lambda: self._keep_and_copy(writer.final), self._group)

    def _keep_and_copy(self, path: Path) -> StorageError | None:
        """A copy that fails is no reason to stop while the next one may succeed: only the last one is an error."""
        folders.prune(self._folder, path.name, self._settings.keep, self._settings.keep_every_images)
        if self._copies is None:
            return None
        try:
            self._copies.send(path, self._count)
        except StorageError as error:
            logger.warning("checkpoint %s could not be copied: %s", path.name, error)
            return error
        try:
            self._copies.prune(path.name, self._settings.keep, self._settings.keep_every_images, self._count)
        except StorageError as error:
            logger.warning("old copies of checkpoints could not be removed: %s", error)
        return None


def _watch(watchdog: Watchdog, write: "Future[None]", writer: Writer, num_pieces: Callable[[], int]) -> None:
    """Return when the write is done; meanwhile tell the watchdog what moves.

    The mark is one for each write on every rank, so that a rank whose disk hangs is behind the others.
    """
    seen, marked = num_pieces(), False
    while not wait([write], POLL_SECONDS).done:
        if num_pieces() != seen:
            seen = num_pieces()
            watchdog.alive()
        if writer.wrote_own_file and not marked:
            watchdog.mark()
            marked = True
    if not marked:
        watchdog.mark()


def _first_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        number, (cause, _) = next(iter(sorted(error.failures.items())))
        return f"rank {number}: {cause}"
    return str(error)
