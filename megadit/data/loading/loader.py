"""The trainer's supply: this rank's batch of every global step, and the fixed validation set.

Order (see schedule.py), draws and bytes are functions of (data set, seed, step). The number of ranks, of workers, and
the timing of the network decide only who fetches a sample and when.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megadit.batch import Batch, Sample, collate, concatenate
from megadit.data.format.members import CorruptShardError
from megadit.data.loading.chunks import ChunkReader
from megadit.data.loading.decode import Content, DecodeError
from megadit.data.loading.fetch import Item, Supply, largest_chunks
from megadit.data.loading.pages import give_back_what_is_freed
from megadit.data.loading.schedule import Schedule, samples_by_resolution
from megadit.data.storage.cache import ChunkCache
from megadit.exit_codes import FAILED, end_now
from megadit.randomness import Purpose, generator
from megadit.recipe import Data

log = logging.getLogger(__name__)

# A run waits so long for a server that is down: longer than a restart or a bad minute of S3 takes.
RETRY_SECONDS = 300.0
# Batches that exist at one time, in batches of the rank: the samples, the batch made of them, and the trainer's; with
# workers two of each wait, and the trainer puts theirs together.
BATCHES_HELD, BATCHES_HELD_WITH_WORKERS = 3, 7
MEGABYTE = 10**6
NAMES_SHOWN = 5


class Loader:
    """The training samples of one rank, endless.

    Rank r of D serves the streams [r*K/D, (r+1)*K/D), so the batches of all ranks, one after the other, are the global
    batch. with_noise: whether they have noise of the shape of their images; False where these are pixels, and whoever
    turns them into latents draws the noise of the latents. with_features: whether they have what the data set has of an
    image encoder's features, see Batch. Raises ValueError when the ranks do not divide the streams, the streams the
    batch, or data.memory_mb is too little for them; ManifestError and StorageError when there is no data set.
    """

    def __init__(
        self,
        data: Data,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        with_noise: bool = True,
        with_features: bool = False,
    ) -> None:
        assert 0 <= rank < world_size
        reader = ChunkReader(data.url, data.client, with_features=with_features)
        self.manifest = reader.manifest
        self.schedule = Schedule(reader.manifest, reader.index, data, seed, batch_size)
        if data.num_streams % world_size:
            raise ValueError(f"{world_size} ranks do not divide data.num_streams {data.num_streams}")
        per_rank = data.num_streams // world_size
        self._streams = range(rank * per_rank, (rank + 1) * per_rank)
        self._data, self._seed, self._batch_size = data, seed, batch_size
        self._with_noise, self._with_features = with_noise, with_features
        self._epoch_samples = sum(bucket.order.epoch_samples for bucket in self.schedule.buckets) // world_size
        self.num_workers = min(data.num_workers, per_rank)
        if self.num_workers < data.num_workers:
            log.info("data.num_workers %d is more than this rank's %d streams", data.num_workers, per_rank)
        self._stream_bytes = self._share_memory(reader)

    def iterate(self, first_step: int) -> Generator[Batch, None, None]:
        """This rank's share, batch_size / world_size samples, of the global steps first_step, first_step + 1, ...

        Closing the iterator stops its threads and workers. Raises StorageError when a sample cannot be read, and when
        more than data.max_corrupt_share of them are corrupt.
        """
        parts = _SubBatches(
            self._data,
            self._seed,
            self._batch_size,
            self._streams,
            first_step,
            self._stream_bytes,
            self._with_noise,
            self._with_features,
        )
        batches = self._counted(self._from_workers(parts) if self.num_workers else parts.of_streams(self._streams))
        _open.add(batches)
        return batches

    def _counted(self, parts: Generator["_SubBatch", None, None]) -> Generator[Batch, None, None]:
        """The batches, while few enough of their samples are corrupt.

        The share is that of the samples that this rank has read since it started, or of an epoch while it has not read
        one: a single one at the start is no reason to stop.
        """
        num_samples, num_corrupt, names = 0, 0, list[str]()
        try:
            for part in parts:
                num_samples += len(part.batch)
                num_corrupt += len(part.faults)
                for fault in part.faults:
                    log.warning("corrupt sample: %s", fault)
                names += part.faults[: NAMES_SHOWN - len(names)]
                share, counted = self._data.max_corrupt_share, max(num_samples, self._epoch_samples)
                if num_corrupt > share * counted:
                    raise CorruptShardError(
                        f"{num_corrupt} corrupt samples are more than data.max_corrupt_share {share:g} of {counted}: "
                        f"{'; '.join(names)}"
                    )
                yield part.batch
        finally:
            parts.close()

    def _from_workers(self, parts: "_SubBatches") -> Generator["_SubBatch", None, None]:
        # Not "fork": it copies locks that torch's threads may hold. Preloading imports torch once, not once a worker.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megadit.data.loading.loader"])
        loader = DataLoader(
            parts,
            batch_size=None,
            num_workers=self.num_workers,
            multiprocessing_context=context,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # or it draws from the trainer's global one
        )
        results = iter(loader)
        try:
            while True:
                # DataLoader asks its workers in turn, so W results in a row are the parts of one step, in order.
                step = [_raised(next(results)) for _ in range(self.num_workers)]
                faults = [fault for part in step for fault in part.faults]
                yield _SubBatch(concatenate([part.batch for part in step]), faults)
        finally:
            del results  # stops the workers

    def _share_memory(self, reader: ChunkReader) -> int:
        """The bytes that one stream may hold of what was read. Raises ValueError."""
        data, num_streams = self._data, len(self._streams)
        held = BATCHES_HELD_WITH_WORKERS if self.num_workers else BATCHES_HELD
        largest_sample = max(
            reader.decoder.decoded_bytes(bucket.height, bucket.width, self._with_noise)
            for bucket in self.schedule.buckets
        )
        decoded_bytes = held * num_streams * self.schedule.share * largest_sample
        chunks = largest_chunks(reader, self.schedule)
        least_bytes = data.chunks_per_group * sum(chunks)  # of each stream: the open group of every bucket
        if decoded_bytes + num_streams * least_bytes > data.memory_mb * MEGABYTE:
            raise ValueError(
                f"data.memory_mb {data.memory_mb} is too little: the open groups of {num_streams} streams (data."
                f"chunks_per_group {data.chunks_per_group} x data.chunk_samples {data.chunk_samples} samples, "
                f"{len(chunks)} resolutions) have up to {num_streams * least_bytes // MEGABYTE} MB, batches "
                f"{decoded_bytes // MEGABYTE} MB; lower data.chunks_per_group or data.chunk_samples, use more ranks, "
                "or raise data.memory_mb"
            )
        return (data.memory_mb * MEGABYTE - decoded_bytes) // num_streams


@dataclass(frozen=True)
class _SubBatch:
    """Some streams' part of a batch, and what is wrong with the samples of it that were replaced."""

    batch: Batch
    faults: list[str]


@dataclass(frozen=True)
class _SubBatches(IterableDataset[_SubBatch | Exception]):
    """What a worker needs to know; worker w of W serves a contiguous share of the rank's streams."""

    data: Data
    seed: int
    batch_size: int
    streams: range
    first_step: int
    stream_bytes: int
    with_noise: bool
    with_features: bool
    # The fork server keeps the environment of its own start: later S3 settings must be brought to the workers.
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)

    def __iter__(self) -> Iterator[_SubBatch | Exception]:
        worker = get_worker_info()
        assert worker is not None
        os.environ.update(self.environment)
        first, last = (len(self.streams) * number // worker.num_workers for number in (worker.id, worker.id + 1))
        try:
            yield from self.of_streams(self.streams[first:last])
        except ValueError as error:
            yield error  # raised by the trainer as it is: DataLoader would wrap it in a traceback

    def of_streams(self, streams: range) -> Generator[_SubBatch, None, None]:
        """The samples of `streams` of each step."""
        data = self.data
        cache = ChunkCache(Path(data.cache_folder), int(data.cache_gb * 1e9)) if data.cache_folder else None
        reader = ChunkReader(data.url, data.client, cache, RETRY_SECONDS, self.with_features)
        schedule = Schedule(reader.manifest, reader.index, data, self.seed, self.batch_size)
        supply = Supply(reader, schedule, streams, self.first_step, self.stream_bytes * len(streams))
        try:
            while True:
                faults: list[str] = []
                samples = [_sample(reader, item, self.seed, self.with_noise, faults) for item in supply.step()]
                yield _SubBatch(collate(samples), faults)
        finally:
            supply.close()
            reader.close()  # or a thread that waits for a server would keep the process from ending


def _raised(part: _SubBatch | Exception) -> _SubBatch:
    if isinstance(part, Exception):
        raise part
    return part


def _sample(reader: ChunkReader, item: Item, seed: int, with_noise: bool, faults: list[str]) -> Sample:
    """The sample of `item` with its draws; a corrupt one has the contents of the next sound one of its chunk.

    Draws stay those of the sample in whose place it is. Adds to `faults` what is wrong. Raises CorruptShardError when
    the chunk has no sound sample.
    """
    chunk, fault = item.chunk, ""
    for distance in range(len(chunk.samples)):
        place = (item.place + distance) % len(chunk.samples)
        source, members = chunk.samples[place], chunk.contents[place]
        try:
            if members is None:
                raise DecodeError(chunk.faults[source])
            content = reader.decoder.decode(members, item.bucket.height, item.bucket.width)
        except DecodeError as error:
            fault = fault or (str(error) if members is None else f"{reader.name(source)}: {error}")
            continue
        if fault:
            faults.append(f"{fault}; {reader.index.keys[source].decode()} is in its place")
        draws = generator(seed, Purpose.TRAINING_SAMPLE, item.epoch, item.sample)
        timestep_uniform, drop_uniform = draws.random(2, dtype=np.float32).tolist()
        noise, image = _settle(reader, content, draws, with_noise)
        return Sample(
            image,
            content.text,
            content.caption,
            reader.label(source),
            noise,
            timestep_uniform,
            drop_uniform,
            item.epoch,
            item.sample,
            replaced=bool(fault),
            features=content.features,
            pixels=content.pixels,
        )
    raise CorruptShardError(f"{fault}; none of the {len(chunk.samples)} samples that were read with it is sound")


def _settle(
    reader: ChunkReader, content: Content, draws: np.random.Generator, with_noise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise, float32 [C, H, W] or [0], and the image that it is for; drawn in this order."""
    assert with_noise or content.std is None, "the draw of a latent comes after that of its noise"
    shape = tuple(content.image.shape) if with_noise else (0,)
    noise = torch.from_numpy(draws.standard_normal(shape, dtype=np.float32))
    return noise, reader.decoder.settle(content, draws)


def validation_batches(
    data: Data,
    seed: int,
    rank: int,
    world_size: int,
    batch_size: int,
    num_timesteps: int,
    with_noise: bool = True,
    with_features: bool = False,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The fixed validation set: every sample at every one of `num_timesteps` strata, once over all ranks.

    Yields batches, each of one resolution, with weights float32 [batch_size]. Every rank yields the same number of
    batches; samples that only fill one up have weight 0. timestep_uniform is the middle of the stratum, the noise a
    function of (seed, sample, stratum), and captions are never dropped, so the weighted mean of a loss does not depend
    on the number of ranks. with_noise, with_features: as those of Loader. Raises ManifestError and StorageError, also
    for a sample that is corrupt.
    """
    assert data.validation_url is not None
    reader = ChunkReader(data.validation_url, data.client, with_features=with_features)
    groups = samples_by_resolution(reader.manifest, reader.index, data.model_copy(update={"url": data.validation_url}))
    batches = [
        (size, samples, first)
        for size, samples in groups.items()
        for first in range(0, _num_samples(reader, samples) * num_timesteps, batch_size)
    ]
    per_rank = -(-len(batches) // world_size)
    for number in range(rank * per_rank, (rank + 1) * per_rank):
        (height, width), places, first = batches[min(number, len(batches) - 1)]
        num_pairs = _num_samples(reader, places) * num_timesteps
        pairs = np.arange(first, first + batch_size)
        weights = torch.from_numpy(((pairs < num_pairs) & (number < len(batches))).astype(np.float32))
        positions, strata = np.divmod(np.minimum(pairs, num_pairs - 1), num_timesteps)
        numbers = positions if places is None else places[positions].astype(np.int64)
        try:
            contents = {
                sample: reader.decoder.decode(members, height, width)
                for sample, members in reader.read(numbers).items()
            }
        except DecodeError as error:
            raise CorruptShardError(
                f"{data.validation_url}: a sample of the validation set is corrupt: {error}"
            ) from error
        samples = []
        for sample, stratum in zip(numbers.tolist(), strata.tolist(), strict=True):
            draws = generator(seed, Purpose.VALIDATION_SAMPLE, sample, stratum)
            content, label = contents[sample], reader.label(sample)
            noise, image = _settle(reader, content, draws, with_noise)
            timestep_uniform = (stratum + 0.5) / num_timesteps
            samples.append(
                Sample(
                    image,
                    content.text,
                    content.caption,
                    label,
                    noise,
                    timestep_uniform,
                    1.0,
                    0,
                    sample,
                    replaced=False,
                    features=content.features,
                    pixels=content.pixels,
                )
            )
        yield collate(samples), weights


def _num_samples(reader: ChunkReader, samples: np.ndarray | None) -> int:
    return reader.manifest.num_samples if samples is None else len(samples)


_open: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop the workers of iterators that were left open: multiprocessing would wait for ever, they ignore SIGTERM."""
    for batches in list(_open):
        batches.close()


def _begin_worker(worker: int) -> None:
    """Make a worker live exactly as long as its trainer wants it to, and hold no more than it counts."""
    give_back_what_is_freed()
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
    end_now(FAILED)
