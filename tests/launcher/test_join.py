"""A command becomes ranks in one way: it starts them, is one of those that somebody started, or is alone."""

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megadit.cli import app
from megadit.launcher import join
from megadit.launcher.environment import Ranks

SHORT = ("training.num_images=16", "checkpoints.every_images=16", "validation=null")
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what `export` writes is undone
        monkeypatch.delenv(name)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """What `launch` was called with; it returns 75."""
    calls: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(join, "launch", lambda num_ranks, arguments: calls.append((num_ranks, arguments)) or 75)
    return calls


def never(ranks: Ranks) -> int:
    raise AssertionError(f"{ranks} is none of the ranks")


def test_nobody_started_it(launched: list[tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["megadit", "data", "pack", "x"])
    assert join.launch_or_join(2, never, ["train", "r"]) == 75
    assert join.launch_or_join(3, never) == 75
    assert launched == [(2, ["-m", "megadit", "train", "r"]), (3, ["-m", "megadit", "data", "pack", "x"])]


def test_alone(launched: list[tuple[int, list[str]]]) -> None:
    assert join.launch_or_join(1, lambda ranks: 7 if ranks == Ranks() else 1) == 7
    assert not launched


def test_one_of_those_that_somebody_started(
    launched: list[tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By srun here, whose variables become those of torchrun, which torch and DeepSpeed read."""
    step = {"NUM_TASKS": "4", "NODELIST": "gpu1"}
    for name, value in {f"SLURM_STEP_{key}": value for key, value in step.items()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_LOCALID", "2")
    assert join.launch_or_join(8, lambda ranks: ranks.rank) == 2
    assert not launched
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "2",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu1",
    }


def test_what_another_job_left_in_the_environment_makes_nobody_wait(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["train", str(tiny_yaml), *SHORT, "--run", str(tmp_path)])
    assert result.exit_code == 0, result.output
