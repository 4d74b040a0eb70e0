"""Says how many of eight large blocks malloc takes from the system: in a plain process, in a worker of a stream."""

import ctypes
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

from megadit.data.loading.loader import _begin_worker
from megadit.data.loading.pages import LARGE_BLOCK_BYTES

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and newer."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES.split())


def num_blocks(is_worker: bool) -> int:
    """After a larger block was freed, which makes glibc keep all that are smaller."""
    if is_worker:
        _begin_worker(0)
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    block = bytearray(16 << 20)
    del block
    before = mallinfo().hblks
    held = [bytearray(2 * LARGE_BLOCK_BYTES) for _ in range(8)]
    found = mallinfo().hblks - before
    assert len(held) == 8
    return int(found)


if __name__ == "__main__":
    for is_worker in (False, True):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            sys.stdout.write(f"{pool.submit(num_blocks, is_worker).result()}\n")
