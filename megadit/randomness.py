"""Counter-based random draws: every random number of a run is a pure function of what it is for.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps (key, counter) to random bits.
The key is (seed, purpose); the counter starts at indices such as (epoch, sample). Nothing depends on the rank, the
world size, the number of workers or how often a run was interrupted.
"""

import hashlib
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a stream of draws is for. The values are part of every run's identity: never renumber them."""

    CHUNK_ORDER = 1
    GROUP_ORDER = 2
    TRAINING_SAMPLE = 3
    VALIDATION_SAMPLE = 4
    SAMPLING_NOISE = 5
    PACKING = 6
    BUCKET_ORDER = 7
    PACKED_LATENT = 8


def generator(seed: int, purpose: Purpose, *indices: int) -> np.random.Generator:
    """A generator for (seed, purpose, indices); at most three indices, each at least 0.

    The lowest 64-bit word of Philox's counter is left for the draws themselves, so streams with different
    indices never overlap.
    """
    assert len(indices) <= 3, f"at most three indices, not {indices}"
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(indices)] = indices
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter))


def seed_of_stage(seed: int, stage: int) -> int:
    """The seed of the order, noise and timesteps of a stage: no stage repeats the draws of another.

    That of stage 0 is `seed` itself.
    """
    if stage == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/stage/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU torch generator for the tensor `name`: initial weights are a function of (seed, name) alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
