"""The benchmark's own pieces at small sizes; its rates are not judged here."""

from pathlib import Path

import pytest

from megadit.benchmarks.data_memory import run_elsewhere, simulate_order
from megadit.benchmarks.data_speed import write_latents
from megadit.data.loading.chunks import ChunkReader


def test_latents_are_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadit.benchmarks.data_speed.LATENTS_PER_SHARD", 20)
    write_latents(tmp_path)
    reader = ChunkReader(str(tmp_path))
    assert reader.manifest.num_samples == 80
    content = reader.decoder.decode(reader.read([77])[77], 256, 256)
    assert content.image.shape == (4, 32, 32)


@pytest.mark.slow
def test_the_order_of_sa1b_fits_into_a_gigabyte() -> None:
    one_rank, all_ranks, peak_bytes = run_elsewhere(simulate_order)
    assert len(one_rank) == len(all_ranks) > 10
    assert peak_bytes < 1e9
