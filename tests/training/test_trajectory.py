"""One recipe is one curve: engines, numbers of ranks and accumulation change rounding only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadit.launcher.trajectory import verify_trajectory
from megadit.training.trajectory import WAYS, Difference, table

FSDP_2 = ("engine.kind=fsdp", "engine.num_ranks=2")
ZERO3_2 = ("engine.kind=zero3", "engine.num_ranks=2")
SIX_STEPS = ("training.num_images=96", "validation.every_images=96")
ACCUMULATING = (*SIX_STEPS, "training.micro_batch_size=4")


def assert_one_curve(run: Any, reference: Any) -> None:
    curve, expected = run.curve(), reference.curve()
    assert curve["step"] == expected["step"]
    assert curve["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert curve["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert run.validation().keys() == {"raw", "ema_0.9"}
    assert run.validation() == pytest.approx(reference.validation(), rel=1e-5)
    assert run.largest_difference(reference) < 1e-4


@pytest.mark.parametrize("way", [FSDP_2, ZERO3_2], ids=["fsdp", "zero3"])
def test_two_ranks_give_the_curve_of_a_single_process(way: tuple[str, ...], finished: Callable, reference: Any) -> None:
    assert reference.curve()["step"] == list(range(1, 21))
    assert_one_curve(finished(*way), reference)


@pytest.mark.parametrize("way", [(), FSDP_2, ZERO3_2], ids=["single", "fsdp", "zero3"])
def test_accumulation_gives_the_same_curve(way: tuple[str, ...], finished: Callable) -> None:
    assert_one_curve(finished(*way, *ACCUMULATING), finished(*SIX_STEPS))


def test_the_curve_falls(reference: Any) -> None:
    loss = reference.curve()["loss"]
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])
    assert reference.validation()["raw"] != reference.validation()["ema_0.9"]


def test_another_seed_is_another_curve(finished: Callable) -> None:
    other, first = finished("seed=1", *SIX_STEPS), finished(*SIX_STEPS)
    assert other.curve()["loss"][0] != pytest.approx(first.curve()["loss"][0], rel=1e-3)


def lines_of(found: str) -> dict[tuple[str, int], str]:
    """The table's lines by engine and ranks."""
    return {(line.split()[0], int(line.split()[1])): line for line in found.splitlines()[2:]}


def test_the_command_compares_engines(tiny_yaml: Path) -> None:
    code, found = verify_trajectory(str(tiny_yaml), [], 3, "zero2-2", 1e-4)
    assert code == 0, found
    assert lines_of(found)["zero2", 2].endswith("yes")


def test_the_command_refuses_what_it_cannot_run(tiny_yaml: Path) -> None:
    with pytest.raises(ValueError, match="'fsdp-3' is not one of fsdp-2, fsdp-4, hsdp-2x2"):
        verify_trajectory(str(tiny_yaml), [], 3, "fsdp-3", 1e-4)
    with pytest.raises(ValueError, match="4 ranks do not divide data.num_streams 2"):
        verify_trajectory(str(tiny_yaml), ["data.num_streams=2"], 3, "zero3-4", 1e-4)


def test_a_difference_is_named_and_fails() -> None:
    found = {"fsdp-2": Difference(1e-6, 2e-6, 3e-6), "hsdp-2x2": Difference(1e-6, float("nan"), 3e-6)}
    assert found["fsdp-2"].within(1e-5)
    assert not found["fsdp-2"].within(2.5e-6)
    assert not found["hsdp-2x2"].within(1.0)
    lines = lines_of(table(found, 1e-5, 3))
    assert lines["fsdp", 2].endswith("yes")
    assert lines["hsdp", 4].endswith("NO")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)], ids=["fp32", "bf16"])
def test_the_whole_matrix(precision: str, tolerance: float, tiny_yaml: Path) -> None:
    code, found = verify_trajectory(str(tiny_yaml), [f"training.precision={precision}"], 30, None, tolerance)
    assert code == 0, found
    assert len(lines_of(found)) == len(WAYS)
