"""The benchmark of memory: what real ranks hold is what was predicted, within 15 %."""

import pytest

from megadit.benchmarks.train_memory import bench_memory, parse_ranks
from megadit.recipe import RecipeError


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_ranks_hold_what_is_predicted(engine: str) -> None:
    rows = bench_memory("quickstart", ["model.width=384"], [engine], [1, 2]).rows
    assert [row["ratio"] for row in rows] == pytest.approx([1.0, 1.0], abs=0.15)
    one, two = (row["measured"] for row in rows)
    assert two < 0.75 * one  # the states, which are most of it, are shared


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="'zero9' is not one of fsdp, hsdp, zero3"):
        bench_memory("quickstart", [], ["zero9"], [1])
    with pytest.raises(RecipeError, match=r"3 ranks do not divide data\.num_streams 8"):
        bench_memory("quickstart", [], ["fsdp"], [3])
    with pytest.raises(ValueError, match="--ranks takes whole numbers with commas between, not 'two'"):
        parse_ranks("1,two")
