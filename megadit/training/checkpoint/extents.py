"""Stretches of bytes of data files, each block with its CRC-32: written, read and verified block by block.

Whoever reads a part of an extent, on another number of ranks, checks what it reads by reading little more. So loading
and verifying are one pass over the disk, straight into the memory of the tensors.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megadit import checksums
from megadit.training.checkpoint.folders import DamageError

BLOCK_BYTES = 2**21  # part of the format
NUM_THREADS = 2  # the disk and the CRC run side by side; both let other threads run

Use = TypeVar("Use")


@dataclass(frozen=True)
class Extent:
    """The bytes [start, start + num_bytes) of `file`, with the CRC-32 of each BLOCK_BYTES of them."""

    file: str
    start: int
    num_bytes: int
    crcs: tuple[int, ...]

    def blocks(self, start: int, end: int) -> Iterator["StoredBlock"]:
        """The blocks that cover the bytes [start, end) of the extent."""
        for number in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            first = number * BLOCK_BYTES
            yield StoredBlock(self.file, self.start, first, min(first + BLOCK_BYTES, self.num_bytes), self.crcs[number])


@dataclass(frozen=True)
class StoredBlock:
    """The bytes [start, end) of the extent that begins at `origin` of `file`."""

    file: str
    origin: int
    start: int
    end: int
    crc: int

    def check(self, content: Tensor) -> None:
        """Raises DamageError unless these bytes were written."""
        if checksums.crc32(_memory(content)) != self.crc:
            raise DamageError(f"{self.file} has changed (its CRC-32 differs)")


@dataclass(frozen=True)
class Read:
    """StoredBlock [start, end) of an extent that go into `target`, a flat tensor of bytes on any device."""

    extent: Extent
    start: int
    end: int
    target: Tensor


def _memory(content: Tensor) -> memoryview:
    return content.numpy().data


def write(descriptor: int, file: str, start: int, data: Tensor, pool: ThreadPoolExecutor) -> Extent:
    """Write a flat tensor of bytes, in the memory of the CPU, at `start` of a file.

    Raises OSError when the disk is full.
    """
    blocks = data.split(BLOCK_BYTES) if data.numel() else ()
    starts = range(start, start + data.numel(), BLOCK_BYTES)
    crcs = pool.map(_write_block, [descriptor] * len(starts), starts, blocks)
    return Extent(file, start, data.numel(), tuple(crcs))


def _write_block(descriptor: int, start: int, block: Tensor) -> int:
    rest = _memory(block)
    crc, end = checksums.crc32(rest), start + len(rest)
    while rest:
        rest = rest[os.pwrite(descriptor, rest, end - len(rest)) :]
    return crc


def read(folder: Path, reads: Sequence[Read]) -> None:
    """Fill the targets, verifying every block that is touched. Raises DamageError and OSError."""
    in_order = sorted(reads, key=lambda read: (read.extent.file, read.extent.start, read.start))
    targets = [(block, read) for read in in_order for block in read.extent.blocks(read.start, read.end)]
    _in_threads(targets, lambda block, read, descriptor: _read_block(descriptor, block, read), folder)


def verify(folder: Path, extents: Iterable[Extent]) -> None:
    """Raises DamageError unless the extents hold what was written, and OSError."""
    in_order = sorted(extents, key=lambda extent: (extent.file, extent.start))
    blocks = [(block, None) for extent in in_order for block in extent.blocks(0, extent.num_bytes)]
    _in_threads(blocks, lambda block, _, descriptor: block.check(_content(descriptor, block)), folder)


def _in_threads(
    blocks: Sequence[tuple[StoredBlock, Use]], use: Callable[[StoredBlock, Use, int], None], folder: Path
) -> None:
    """`use(block, ..., descriptor of its file)` for all blocks, which are in the order of the disk.

    Each thread has files and a run of neighbours of its own: threads that take turns defeat the kernel's reading ahead.
    """

    def use_run(run: Sequence[tuple[StoredBlock, Use]]) -> None:
        for name, group in groupby(run, key=lambda pair: pair[0].file):
            with (folder / name).open("rb", buffering=0) as file:
                for block, other in group:
                    use(block, other, file.fileno())

    length = -(-len(blocks) // NUM_THREADS) or 1
    runs = [blocks[start : start + length] for start in range(0, len(blocks), length)]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for _ in pool.map(use_run, runs):
            pass


def _read_block(descriptor: int, block: StoredBlock, read: Read) -> None:
    start, end = max(read.start, block.start), min(read.end, block.end)
    target = read.target[start - read.start : end - read.start]
    if end - start == block.end - block.start and target.device.type == "cpu":
        block.check(_fill(target, descriptor, block))
    else:
        content = _content(descriptor, block)
        block.check(content)
        target.copy_(content[start - block.start : end - block.start])


def _content(descriptor: int, block: StoredBlock) -> Tensor:
    return _fill(torch.empty(block.end - block.start, dtype=torch.uint8), descriptor, block)


def _fill(buffer: Tensor, descriptor: int, block: StoredBlock) -> Tensor:
    rest = _memory(buffer)
    while rest:
        num_read = os.preadv(descriptor, [rest], block.origin + block.end - len(rest))
        if not num_read:
            raise DamageError(f"{block.file} has become shorter")
        rest = rest[num_read:]
    return buffer
