"""Memory that is used again: never while somebody looks at it, never more of it than there is room for."""

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings as effort, strategies as st

from megadit.data.loading.pages import Pages

sizes = st.integers(1, 40_000)


@effort(max_examples=100, deadline=None)
@given(steps=st.lists(st.tuples(sizes, st.integers(0, 5)), max_size=40), room=st.sampled_from([0, 30_000, 1 << 30]))
def test_what_is_looked_at_stays(steps: list[tuple[int, int]], room: int) -> None:
    """Views of any kind hold on to their bytes, whatever else is taken, given back and taken again."""
    pages, held = Pages(), list[tuple[int, np.ndarray, memoryview]]()
    pages.room_bytes = room
    for number, (size, place) in enumerate(steps):
        file, view = pages.take(size)
        assert len(view) == size
        file.write(bytes([number]) * size)
        held.append((number, np.frombuffer(view, np.uint8, offset=size // 2), view[size // 3 :]))
        del file, view
        if place < len(held):
            del held[place]
        for value, array, part in held:
            assert set(array.tolist()) | set(part) <= {value}
        assert sum(map(len, pages._spare)) <= room


def test_it_is_used_again() -> None:
    pages = Pages()
    pages.room_bytes = 1 << 20
    file, view = pages.take(1000)
    file.write(b"first")
    part = view[:5]
    del view
    other, _ = pages.take(1000)
    assert other is not file
    del part
    assert pages.take(2000)[0] is file


def test_memory_goes_back_to_the_system() -> None:
    """From many threads: what exceeds the room is given up, and so is everything with the owner."""
    size, pages, process = 4 << 20, Pages(), psutil.Process()
    pages.room_bytes, data = 2 * size, bytes(size)

    def work() -> None:
        for _ in range(20):
            file, _ = pages.take(size)
            file.write(data)

    work()
    before = process.memory_info().rss
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process.memory_info().rss - before < 3 * size
    assert sum(map(len, pages._spare)) <= 2 * size


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc 2.33 or newer")
def test_a_worker_gives_back_large_blocks() -> None:
    """glibc by itself keeps in a process what has once been freed there."""
    script = Path(__file__).parents[2] / "workers" / "large_blocks.py"
    said = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.split() == ["0", "8"]
