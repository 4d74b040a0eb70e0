"""The benchmark's own pieces at small sizes; its rates are not judged here."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megadit.benchmarks.data_memory import growth_bytes, run_elsewhere, simulate_order
from megadit.benchmarks.data_speed import write_latents
from megadit.data.format.manifest import ImageFacts
from megadit.data.loading.chunks import ChunkReader


def test_latents_are_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadit.benchmarks.data_speed.LATENTS_PER_SHARD", 20)
    write_latents(tmp_path)
    reader = ChunkReader(str(tmp_path))
    assert reader.manifest.num_samples == 80
    content = reader.decoder.decode(reader.read([77])[77], 256, 256)
    assert content.image.shape == (4, 32, 32)


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


@pytest.mark.slow
def test_the_order_of_sa1b_fits_into_a_gigabyte() -> None:
    one_rank, all_ranks, peak_bytes = run_elsewhere(simulate_order)
    assert len(one_rank) == len(all_ranks) > 10
    assert peak_bytes < 1e9
