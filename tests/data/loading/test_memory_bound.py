"""What a process that streams holds stays within data.memory_mb."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megadit.benchmarks.data_memory import growth_bytes, run_elsewhere
from megadit.data.format.manifest import ImageFacts


@pytest.mark.slow
def test_memory_stays_within_its_bound(tmp_path: Path, data_set: Callable) -> None:
    """20 s of pictures of 1 MB, with less memory than would be read ahead; ten minutes are the benchmark's."""
    draws, memory_mb = np.random.default_rng(0), 330

    def picture() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(draws.integers(0, 256, (600, 550, 3), dtype=np.uint8)).save(
            buffer, format="PNG", compress_level=0
        )
        return buffer.getvalue()

    samples = [{"png": picture()} for _ in range(160)]
    sizes = np.full((160, 2), (600, 550), dtype=np.uint16)
    data_set(str(tmp_path), [(None, samples)], image=ImageFacts(resize=None), sizes=sizes)
    assert 0.3 * memory_mb < run_elsewhere(growth_bytes, str(tmp_path), 20, memory_mb) / 1e6 < 1.2 * memory_mb
