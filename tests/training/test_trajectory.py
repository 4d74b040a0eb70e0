"""One recipe is one curve: engines, numbers of ranks and accumulation change rounding only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadit.launcher.comparing_runs import (
    MIN_STEPS_TO_RESUME,
    WAYS,
    Difference,
    Killed,
    kill_step,
    require_resumed,
    resume_table,
    table,
)
from megadit.launcher.short_runs import verify_resume, verify_trajectory

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


# Resumed on another engine


def test_the_command_kills_on_one_engine_and_resumes_on_another(tiny_yaml: Path) -> None:
    code, found = verify_resume(str(tiny_yaml), [], MIN_STEPS_TO_RESUME, "zero2-2", 1e-4)
    assert code == 0, found
    lines = found.splitlines()
    assert lines[1].split()[-2:] == ["single", "zero2-2"]
    for line, name in zip(lines[2:4], ("single", "zero2-2"), strict=True):
        killed_on, at_step, from_step, *cells = line.split()
        assert killed_on == name
        assert 2 <= int(from_step) < int(at_step) < MIN_STEPS_TO_RESUME  # some steps were lost
        assert all(float(cell) < 1e-4 for cell in cells)
    assert lines[4].startswith("4 pairs, all within 0.0001; largest: loss ")


def test_too_few_steps_to_resume_are_refused(tiny_yaml: Path) -> None:
    with pytest.raises(ValueError, match="11 steps are too few to be killed and resumed: give at least 12"):
        verify_resume(str(tiny_yaml), [], 11, "fsdp-2", 1e-4)


@pytest.mark.parametrize("num_steps", [MIN_STEPS_TO_RESUME, 30, 31])
def test_a_run_is_killed_between_checkpoints(num_steps: int, tiny_recipe: Callable) -> None:
    every = num_steps // 6
    steps = [kill_step(name, tiny_recipe(f"seed={seed}"), num_steps) for name in WAYS for seed in range(9)]
    assert len(set(steps)) >= 3
    assert all(2 * every < step < num_steps - every and step % every for step in steps)


def test_a_run_that_began_anew_is_told_from_one_that_was_resumed(finished: Callable, reference: Any) -> None:
    anew = finished("engine.kind=fsdp")  # the same curve, at other times
    require_resumed(reference.folder, reference.folder, 5)
    with pytest.raises(ValueError, match=r"did not go on after step 5: it has done earlier ones again"):
        require_resumed(anew.folder, reference.folder, 5)


def test_a_pair_that_differs_is_named() -> None:
    good, bad = Difference(1e-6, 2e-6, 3e-6), Difference(1e-6, 2e-3, float("nan"))
    found = {"single": Killed(7, 6, {"single": good, "fsdp-2": bad}), "fsdp-2": Killed(8, 6, {"single": good})}
    lines = resume_table(found, 1e-5, 12).splitlines()
    assert lines[2].split() == ["single", "7", "6", "3.0e-06", "nan!"]
    assert lines[4] == "single to fsdp-2: loss 1.0e-06, grad norm 2.0e-03, weights nan"
    assert lines[5].startswith("3 pairs, 1 NOT within 1e-05")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_ordered_pair(tiny_yaml: Path) -> None:
    code, found = verify_resume(str(tiny_yaml), [], 30, None, 1e-4)
    assert code == 0, found
    assert found.splitlines()[-1].startswith("100 pairs, all within 0.0001")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)], ids=["fp32", "bf16"])
def test_the_whole_matrix(precision: str, tolerance: float, tiny_yaml: Path) -> None:
    code, found = verify_trajectory(str(tiny_yaml), [f"training.precision={precision}"], 30, None, tolerance)
    assert code == 0, found
    assert len(lines_of(found)) == len(WAYS)
