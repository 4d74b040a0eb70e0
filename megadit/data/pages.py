"""Memory for what is read: it comes from the system, and is used again as soon as nobody looks at it.

A new page is cleared by the kernel before it is filled, which costs several times what copying into it does. malloc
would use memory again, too, but what glibc frees it keeps, in an arena for each thread: half as much again as the
stream holds.
"""

import contextlib
import mmap
import weakref

import numpy as np


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
