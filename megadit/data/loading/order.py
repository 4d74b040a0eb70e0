"""Which samples a step takes: a pure function of (number of samples, seed, step), fast for tens of millions.

Chunks are C neighbours of the data set, because neighbours come by one Range GET. Each epoch lays the chunks from
another offset, permutes them, and deals them to K streams; within a stream, the samples of G chunks at a time are
permuted. Step n takes B/K samples from each stream. Ranks and workers only decide who reads which stream.
"""

from functools import lru_cache

import numpy as np

from megadit.randomness import Purpose, generator


class Order:
    """The order of `num_samples` samples under `seed`; the other arguments are those of the recipe's `data`.

    An epoch has `epoch_samples` samples, a multiple of K*G*C; no sample occurs twice in it, and which ones sit out
    differs from epoch to epoch. Raises ValueError when there are not enough samples for one epoch.
    """

    def __init__(
        self, num_samples: int, seed: int, num_streams: int, chunk_samples: int, chunks_per_group: int
    ) -> None:
        self.num_samples, self.seed, self.num_streams = num_samples, seed, num_streams
        self.chunk_samples, self.chunks_per_group = chunk_samples, chunks_per_group
        self.group_samples = chunk_samples * chunks_per_group
        self.groups_per_epoch = num_samples // chunk_samples // (num_streams * chunks_per_group)  # of each stream
        self.epoch_samples = self.groups_per_epoch * num_streams * self.group_samples
        if not self.groups_per_epoch:
            raise ValueError(
                f"{num_samples} samples are too few for data.num_streams {num_streams} x data.chunks_per_group "
                f"{chunks_per_group} x data.chunk_samples {chunk_samples} = {num_streams * self.group_samples}; "
                "lower one of the three"
            )
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)  # streams cross into the next epoch together

    def group(self, stream: int, number: int) -> tuple[int, np.ndarray]:
        """Group `number` of a stream, counted over all epochs: its epoch and its samples, int64 [G*C], in order."""
        epoch, chunks_GC, places = self.group_chunks(stream, number)
        return epoch, chunks_GC.reshape(-1)[places]

    def group_chunks(self, stream: int, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The same before its samples are permuted: epoch, neighbours int64 [G, C], places int64 [G*C] in [0, G*C)."""
        epoch, group = divmod(number, self.groups_per_epoch)
        offset, chunks = self._epoch(epoch)
        starts = (
            offset
            + chunks[group * self.chunks_per_group : (group + 1) * self.chunks_per_group, stream] * self.chunk_samples
        )
        chunks_GC = (starts[:, None] + np.arange(self.chunk_samples)) % self.num_samples
        return epoch, chunks_GC, self._places(epoch, stream, group)

    def stream_samples(self, stream: int, position: int, count: int) -> np.ndarray:
        """(epoch, sample), int64 [count, 2]: what the stream gives after its first `position` samples."""
        first, skip = divmod(position, self.group_samples)
        last = (position + count - 1) // self.group_samples
        groups = [self.group(stream, number) for number in range(first, last + 1)]
        pairs = np.concatenate([np.stack([np.full_like(samples, epoch), samples], axis=1) for epoch, samples in groups])
        return pairs[skip : skip + count]

    def step(self, number: int, batch_size: int) -> np.ndarray:
        """(epoch, sample), int64 [batch_size, 2], of a global step: the share of stream 0, of stream 1, ...

        Raises ValueError when the streams do not divide the batch.
        """
        share = self.stream_share(batch_size)
        first, skip = divmod(number * share, self.group_samples)
        last = (number * share + share - 1) // self.group_samples
        pairs_KN2 = np.concatenate([self._groups(group) for group in range(first, last + 1)], axis=1)
        return pairs_KN2[:, skip : skip + share].reshape(batch_size, 2)

    def _groups(self, number: int) -> np.ndarray:
        """(epoch, sample), int64 [K, G*C, 2]: group `number` of every stream, as `group` gives it for one."""
        epoch, group = divmod(number, self.groups_per_epoch)
        offset, chunks = self._epoch(epoch)
        chunks_GK = chunks[group * self.chunks_per_group : (group + 1) * self.chunks_per_group]
        starts_KG = offset + chunks_GK.T * self.chunk_samples
        samples_KN = (starts_KG[:, :, None] + np.arange(self.chunk_samples)).reshape(self.num_streams, -1)
        places_KN = np.stack([self._places(epoch, stream, group) for stream in range(self.num_streams)])
        samples_KN = np.take_along_axis(samples_KN % self.num_samples, places_KN, axis=1)
        return np.stack([np.full_like(samples_KN, epoch), samples_KN], axis=2)

    def _places(self, epoch: int, stream: int, group: int) -> np.ndarray:
        """How a group is shuffled: int64 [G*C]."""
        return generator(self.seed, Purpose.GROUP_ORDER, epoch, stream, group).permutation(self.group_samples)

    def stream_share(self, batch_size: int) -> int:
        """How many samples of each step come from one stream. Raises ValueError."""
        if batch_size % self.num_streams:
            raise ValueError(f"data.num_streams {self.num_streams} must divide training.batch_size {batch_size}")
        return batch_size // self.num_streams

    def _compute_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """The offset, and the chunks int64 [chunks of a stream, K], dealt one to each stream in turn."""
        draws = generator(self.seed, Purpose.CHUNK_ORDER, epoch)
        offset = int(draws.integers(self.num_samples))
        used = self.groups_per_epoch * self.chunks_per_group * self.num_streams
        return offset, draws.permutation(self.num_samples // self.chunk_samples)[:used].reshape(-1, self.num_streams)
