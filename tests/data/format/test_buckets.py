import numpy as np
import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from hypothesis import given, strategies as st

from megadit.data.format.buckets import assign, bucket_table

RESOLUTIONS = [16, 32, 64, 128, 256, 512, 768, 1024]
PIXART = {256: ASPECT_RATIO_256_BIN, 512: ASPECT_RATIO_512_BIN, 1024: ASPECT_RATIO_1024_BIN}


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_the_tables(resolution: int) -> None:
    table = bucket_table(resolution)
    step = 32 if resolution >= 512 else 16
    assert table == sorted(set(table))
    assert (resolution, resolution) in table
    assert {(width, height) for height, width in table} == set(table)
    for height, width in table:
        assert height % step == width % step == 0
        assert 0.9 <= height * width / resolution**2 <= 1.1
        assert 0.25 <= height / width <= 4
    ratios = [height / width for height, width in table]
    assert len(set(ratios)) == len(ratios)


@pytest.mark.parametrize("resolution", PIXART)
def test_pixarts_shapes_are_covered(resolution: int) -> None:
    """Its published tables, of as many buckets or fewer: each has one of ours within 7 % of its ratio."""
    ours = np.log([height / width for height, width in bucket_table(resolution)])
    assert len(ours) >= len(PIXART[resolution])
    for height, width in PIXART[resolution].values():
        assert np.abs(ours - np.log(height / width)).min() < 0.07


@pytest.mark.parametrize("resolution", [0, 8, 100, 528])
def test_resolutions_that_make_no_table(resolution: int) -> None:
    with pytest.raises(ValueError, match=f"must be a multiple of (16|32), not {resolution}"):
        bucket_table(resolution)


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1), st.sampled_from(RESOLUTIONS))
def test_the_nearest_ratio(sizes: list[tuple[int, int]], resolution: int) -> None:
    table = bucket_table(resolution)
    ratios = np.log([height / width for height, width in table])
    for (height, width), place in zip(sizes, assign(np.array(sizes, np.uint16), table), strict=True):
        distance = np.abs(np.log(height / width) - ratios)
        assert distance[place] == pytest.approx(distance.min(), abs=1e-12)


def test_a_buckets_own_size_goes_to_it() -> None:
    table = bucket_table(256)
    np.testing.assert_array_equal(assign(np.array(table), table), np.arange(len(table)))
    assert [table[place] for place in assign(np.array([[1500, 2250], [2250, 1500], [9, 1000]]), table)] == [
        (208, 320),
        (320, 208),
        (128, 512),
    ]
