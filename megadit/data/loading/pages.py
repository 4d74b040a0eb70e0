"""Memory for what is read: it comes from the system, and is used again as soon as nobody looks at it.

A new page is cleared by the kernel before it is filled, which costs several times what copying into it does. malloc
would use memory again, too, but what glibc frees it keeps, in an arena for each thread: half as much again as the
stream holds.
"""

import contextlib
import ctypes
import mmap
import weakref

import numpy as np

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h
LARGE_BLOCK_BYTES = 512 << 10


class Pages:
    """Buffers that are given back by themselves, with the last view of them. Methods may be called from any thread.

    Of those that nobody has at the moment, as many are kept as fit into `room_bytes`, which the owner sets.
    """

    def __init__(self) -> None:
        self.room_bytes = 0
        self._spare: list[mmap.mmap] = []  # no lock: `_keep` may be called at any point of any thread

    def take(self, size: int) -> tuple[mmap.mmap, memoryview]:
        """`size` bytes of any content: as a file at its start, and the view that holds on to them."""
        pages = self._resized(size) or mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.seek(0)
        owner = np.frombuffer(pages, dtype=np.uint8)  # views refer to it; a memoryview cannot be watched itself
        weakref.finalize(owner, self._keep, pages)
        return pages, owner.data

    def _resized(self, size: int) -> mmap.mmap | None:
        with contextlib.suppress(IndexError, BufferError):  # there is none, or its last view is just going
            pages = self._spare.pop()
            pages.resize(size)
            return pages
        return None

    def _keep(self, pages: mmap.mmap) -> None:
        self._spare.append(pages)
        while sum(map(len, self._spare)) > self.room_bytes:
            with contextlib.suppress(IndexError):  # another thread was faster
                self._spare.pop()


def give_back_what_is_freed() -> None:
    """Have malloc take large blocks from the system and give them back, in this process from now on.

    glibc raises its limit for that to 32 MB as blocks are freed, and has an arena for each thread: two workers of a
    stream grew by 815 MB instead of 480 where data.memory_mb was 400, at the same speed. With 256 KB it was 411 to 458,
    a fifth slower. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        mallopt(M_ARENA_MAX, 1)
