"""The first 20 steps of every shipped recipe of CPU size have the losses that they had when these were written down."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megadit.recipe import RECIPE_FOLDER, load

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "losses.json").read_text())
NARROW = [name for name in GOLDEN["curves"] if load(name).model.width == 64]  # a second each; the others, ten
WIDE = [name for name in GOLDEN["curves"] if name not in NARROW]
LOSS, GRAD_NORM = 1e-6, 1e-5
"""Relative, with the torch and the code paths that they were written down with."""
ELSEWHERE = 100
"""Times this with others; golden/record.py says what they do."""


def test_every_recipe_of_cpu_size_is_there() -> None:
    assert sorted(GOLDEN["curves"]) == sorted(path.stem for path in RECIPE_FOLDER.glob("*-cpu.yaml"))
    assert {len(column) for curve in GOLDEN["curves"].values() for column in curve.values()} == {20}


@pytest.mark.parametrize("names", [NARROW, pytest.param(WIDE, marks=pytest.mark.slow)], ids=["narrow", "wide"])
def test_losses_are_what_they_were(names: list[str], tmp_path: Path) -> None:
    again = trained_again(names, tmp_path / "losses.json")
    slack = 1 if again["made"] == GOLDEN["made"] else ELSEWHERE
    for name in names:
        curve, golden = again["curves"][name], GOLDEN["curves"][name]
        assert curve["loss"] == pytest.approx(golden["loss"], rel=slack * LOSS, abs=0), name
        assert curve["grad_norm"] == pytest.approx(golden["grad_norm"], rel=slack * GRAD_NORM, abs=0), name


def trained_again(names: list[str], path: Path) -> dict[str, Any]:
    command = [sys.executable, "-P", FOLDER / "record.py", path, *names]
    result = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(path.read_text())
