"""One recipe is one curve: engines, numbers of ranks and accumulation change rounding only."""

from collections.abc import Callable
from typing import Any

import pytest

WAYS = {
    "fsdp on 1": ["engine.kind=fsdp"],
    "fsdp on 2": ["engine.kind=fsdp", "engine.num_ranks=2"],
    "zero3 on 2": ["engine.kind=zero3", "engine.num_ranks=2"],
    "single, accumulating": ["training.micro_batch_size=4"],
    "fsdp on 2, accumulating": ["engine.kind=fsdp", "engine.num_ranks=2", "training.micro_batch_size=4"],
    "zero3 on 2, accumulating": ["engine.kind=zero3", "engine.num_ranks=2", "training.micro_batch_size=4"],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_engine_gives_the_curve_of_a_single_process(
    way: str, train: Callable, tiny_recipe: Callable, reference: Any
) -> None:
    run = train(tiny_recipe(*WAYS[way]))
    curve, expected = run.curve(), reference.curve()
    assert curve["step"] == expected["step"] == list(range(1, 21))
    assert curve["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert curve["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert run.validation() == pytest.approx(reference.validation(), rel=1e-5)
    assert run.validation().keys() == {"raw", "ema_0.9"}
    assert run.largest_difference(reference) < 1e-4


def test_the_curve_falls(reference: Any) -> None:
    loss = reference.curve()["loss"]
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])
    assert reference.validation()["raw"] != reference.validation()["ema_0.9"]


def test_another_seed_is_another_curve(train: Callable, tiny_recipe: Callable, reference: Any) -> None:
    other = train(tiny_recipe("seed=1", "training.num_images=48", "optimizer.schedule=constant"))
    assert other.curve()["loss"] != pytest.approx(reference.curve()["loss"][:3], rel=1e-3)
