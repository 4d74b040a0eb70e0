"""One recipe is one curve: engines, numbers of ranks and accumulation change rounding only."""

from collections.abc import Callable
from typing import Any

import pytest

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
