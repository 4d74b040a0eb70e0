"""The benchmark of memory: what real ranks hold is what was predicted, within 10 %."""

import pytest

from megadit.benchmarks.train_memory import OPTIONS, bench_memory, parse_ranks
from megadit.recipe import RecipeError

NEAR = pytest.approx(1.0, abs=0.1)


def test_ranks_hold_what_is_predicted() -> None:
    """Whole gradients are seen in what is measured, too."""
    small = ["model.width=384"]
    rows = bench_memory("quickstart", small, ["fsdp"], [2], ["micro-batches-bf16", "whole-gradients"]).rows
    assert [row["ratio"] for row in rows] == [NEAR, NEAR]
    sharded, whole = (row["measured"] for row in rows)
    assert whole > 1.1 * sharded


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["single", "fsdp", "hsdp", "zero1", "zero2", "zero3"])
def test_every_engine_and_option_holds_what_is_predicted(engine: str) -> None:
    rows = bench_memory("quickstart", [], [engine], [1, 2, 4], list(OPTIONS)).rows
    assert rows
    assert {(row["option"], row["ranks"]): row["ratio"] for row in rows if row["ratio"] != NEAR} == {}


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="'zero9' is not one of single, fsdp, hsdp, zero1, zero2, zero3"):
        bench_memory("quickstart", [], ["zero9"], [1], ["plain"])
    with pytest.raises(ValueError, match="'small' is not one of plain, bf16"):
        bench_memory("quickstart", [], ["fsdp"], [1], ["small"])
    with pytest.raises(RecipeError, match=r"3 ranks do not divide data\.num_streams 8"):
        bench_memory("quickstart", [], ["fsdp"], [3], ["plain"])
    with pytest.raises(ValueError, match="--ranks takes whole numbers with commas between, not 'two'"):
        parse_ranks("1,two")
