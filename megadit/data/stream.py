"""The trainer's supply: this rank's batch of every global step, and the fixed validation set.

Order (see order.py), draws and bytes are functions of (data set, seed, step). The number of ranks, of workers, and the
timing of the network decide only who fetches a sample and when.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megadit.data.batch import Batch, Sample, collate, concatenate
from megadit.data.manifest import Manifest
from megadit.data.order import Order
from megadit.data.reader import Reader
from megadit.randomness import Purpose, generator
from megadit.recipe import Data

log = logging.getLogger(__name__)

FETCH_THREADS = 8  # Range GETs in flight in one process


class Stream:
    """The training samples of one rank, endless.

    Rank r of D serves the streams [r*K/D, (r+1)*K/D), so the batches of all ranks, one after the other, are the global
    batch. Raises ValueError when the ranks do not divide the streams, or the streams the batch; ManifestError and
    StorageError when there is no data set.
    """

    def __init__(self, data: Data, seed: int, batch_size: int, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size
        self.manifest = Manifest.load(data.url)
        order = _order(data, seed, self.manifest)
        order.stream_share(batch_size)
        if data.num_streams % world_size:
            raise ValueError(f"{world_size} ranks do not divide data.num_streams {data.num_streams}")
        per_rank = data.num_streams // world_size
        self._streams = range(rank * per_rank, (rank + 1) * per_rank)
        self._data, self._seed, self._batch_size = data, seed, batch_size
        self.num_workers = min(data.num_workers, per_rank)
        if self.num_workers < data.num_workers:
            log.info("data.num_workers %d is more than this rank's %d streams", data.num_workers, per_rank)

    def iterate(self, first_step: int) -> Generator[Batch, None, None]:
        """This rank's share, batch_size / world_size samples, of the global steps first_step, first_step + 1, ...

        Closing the iterator stops its threads and workers. Raises StorageError when a sample cannot be read.
        """
        parts = _Parts(self._data, self._seed, self._batch_size, self._streams, first_step)
        if not self.num_workers:
            return parts.batches(self._streams)
        batches = self._from_workers(parts)
        _open.add(batches)
        return batches

    def _from_workers(self, parts: "_Parts") -> Generator[Batch, None, None]:
        # Not "fork": it copies locks that torch's threads may hold. Preloading imports torch once, not once a worker.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megadit.data.stream"])
        loader = DataLoader(
            parts,
            batch_size=None,
            num_workers=self.num_workers,
            multiprocessing_context=context,
            worker_init_fn=_follow_the_trainer,
            generator=torch.Generator(),  # or it draws from the trainer's global one
        )
        results = iter(loader)
        try:
            while True:
                # DataLoader asks its workers in turn, so W results in a row are the parts of one step, in order.
                step = [next(results) for _ in range(self.num_workers)]
                for part in step:
                    if isinstance(part, Exception):
                        raise part
                yield concatenate(step)
        finally:
            del results  # stops the workers


@dataclass(frozen=True)
class _Parts(IterableDataset[Batch | Exception]):
    """What a worker needs to know; worker w of W serves a contiguous share of the rank's streams."""

    data: Data
    seed: int
    batch_size: int
    streams: range
    first_step: int
    # The fork server keeps the environment of its own start: later S3 settings must be brought to the workers.
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)

    def __iter__(self) -> Iterator[Batch | Exception]:
        worker = get_worker_info()
        assert worker is not None
        os.environ.update(self.environment)
        first, last = (len(self.streams) * number // worker.num_workers for number in (worker.id, worker.id + 1))
        try:
            yield from self.batches(self.streams[first:last])
        except ValueError as error:
            yield error  # raised by the trainer as it is: DataLoader would wrap it in a traceback

    def batches(self, streams: range) -> Generator[Batch, None, None]:
        """The samples of `streams` of each step."""
        reader = Reader(self.data.url)
        order = _order(self.data, self.seed, reader.manifest)
        share = order.stream_share(self.batch_size)
        pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="megadit-fetch")
        try:
            supplies = [_supply(order, reader, pool, stream, self.first_step * share) for stream in streams]
            while True:
                yield collate([next(supply) for supply in supplies for _ in range(share)])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _supply(order: Order, reader: Reader, pool: ThreadPoolExecutor, stream: int, position: int) -> Iterator[Sample]:
    """The samples of a stream after its first `position`; the next group is fetched while one is consumed."""

    def fetch(number: int) -> list[Future[dict[int, dict[str, bytes]]]]:
        # A permuted group still is G runs of neighbours; split by G, so that its GETs run side by side.
        _, samples = order.group(stream, number)
        return [pool.submit(reader.read, part) for part in np.array_split(np.sort(samples), order.chunks_per_group)]

    number, skip = divmod(position, order.group_samples)
    pending = fetch(number)
    while True:
        current, pending = pending, fetch(number + 1)
        epoch, samples = order.group(stream, number)
        members = {sample: found for part in current for sample, found in part.result().items()}
        for sample in samples[skip:].tolist():
            draws = generator(order.seed, Purpose.TRAINING_SAMPLE, epoch, sample)
            timestep_uniform, drop_uniform = draws.random(2, dtype=np.float32).tolist()
            image, text = reader.decode(members[sample])
            noise = torch.from_numpy(draws.standard_normal(tuple(image.shape), dtype=np.float32))
            yield Sample(image, text, reader.label(sample), noise, timestep_uniform, drop_uniform, epoch, sample)
        number, skip = number + 1, 0


def validation_batches(
    url: str, seed: int, rank: int, world_size: int, batch_size: int, num_timesteps: int
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The fixed validation set: every sample at every one of `num_timesteps` strata, once over all ranks.

    Yields batches with weights float32 [batch_size]. Every rank yields the same number of batches; samples that only
    fill one up have weight 0. timestep_uniform is the middle of the stratum, the noise a function of (seed, sample,
    stratum), and captions are never dropped, so the weighted mean of a loss does not depend on the number of ranks.
    Raises ManifestError and StorageError.
    """
    reader = Reader(url)
    num_pairs = reader.manifest.num_samples * num_timesteps
    num_batches = -(-num_pairs // (world_size * batch_size))
    for number in range(rank * num_batches, (rank + 1) * num_batches):
        pairs = np.arange(number * batch_size, (number + 1) * batch_size)
        weights = torch.from_numpy((pairs < num_pairs).astype(np.float32))
        pairs = np.minimum(pairs, num_pairs - 1)
        decoded = {sample: reader.decode(found) for sample, found in reader.read(pairs // num_timesteps).items()}
        samples = []
        for sample, stratum in zip(*np.divmod(pairs, num_timesteps), strict=True):
            image, text = decoded[int(sample)]
            draws = generator(seed, Purpose.VALIDATION_SAMPLE, int(sample), int(stratum))
            noise = torch.from_numpy(draws.standard_normal(tuple(image.shape), dtype=np.float32))
            uniform, label = (stratum + 0.5) / num_timesteps, reader.label(sample)
            samples.append(Sample(image, text, label, noise, uniform, 1.0, 0, int(sample)))
        yield collate(samples), weights


def _order(data: Data, seed: int, manifest: Manifest) -> Order:
    return Order(manifest.num_samples, seed, data.num_streams, data.chunk_samples, data.chunks_per_group)


_open: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop the workers of iterators that were left open: multiprocessing would wait for ever, they ignore SIGTERM."""
    for batches in list(_open):
        batches.close()


def _follow_the_trainer(worker: int) -> None:
    """Make a worker live exactly as long as its trainer wants it to."""
    # Ctrl-C and a scheduler's SIGTERM reach every process, but the trainer still has a checkpoint to write.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # DataLoader's own watchdog looks at the parent, which here is the fork server; and that one lives as long as its
    # children do, since they inherit the pipe whose end would stop it.
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)
