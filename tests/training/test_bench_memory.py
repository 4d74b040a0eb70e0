"""The benchmark of memory: what real ranks hold is what was predicted, within 15 %."""

import pytest

from megadit.recipe import RecipeError
from megadit.training.bench_memory import compare, main


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_ranks_hold_what_is_predicted(engine: str) -> None:
    headings, *rows = (
        line.split() for line in compare("quickstart", ["model.width=384"], [engine], [1, 2]).split("\n")
    )
    ratios = [float(row[headings.index("ratio")]) for row in rows]
    assert ratios == pytest.approx([1.0, 1.0], abs=0.15)
    one, two = (int(row[headings.index("measured")]) for row in rows)
    assert two < 0.75 * one  # the states, which are most of it, are shared


def test_what_cannot_be_measured_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'zero9' is not one of fsdp, hsdp, zero3"):
        compare("quickstart", [], ["zero9"], [1])
    with pytest.raises(RecipeError, match=r"3 ranks do not divide data\.num_streams 8"):
        compare("quickstart", [], ["fsdp"], [3])
    monkeypatch.setattr("sys.argv", ["bench_memory", "--ranks", "1,two"])
    assert main() == 1
    assert "megadit: error: --ranks takes whole numbers with commas between, not 'two'" in capsys.readouterr().err
