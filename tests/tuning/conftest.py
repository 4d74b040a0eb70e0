"""A small sweep that really trains, and what its folder says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megadit.tuning.study import Study, Trial
from megadit.tuning.sweep import sweep

SHORT = ("validation=null", "training.num_images=96")  # 6 steps
SPACE = ("model.width=32,64", "optimizer.lr=2^-7,2^8")  # the second learning rate diverges at once


@pytest.fixture(scope="session")
def swept(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of four trials, two of which diverge. It is shared: tests that change it make a copy."""
    folder = tmp_path_factory.mktemp("studies") / "tiny"
    assert sweep(str(tiny_yaml), folder, SPACE, SHORT, num_workers=2) == 0
    return folder


@pytest.fixture(scope="session")
def trials() -> Callable[[Path], dict[str, Trial]]:
    """The trials of a study by name."""
    return lambda folder: {trial.name: trial for trial in Study(folder).trials()}


@pytest.fixture(scope="session")
def num_starts() -> Callable[[Path], dict[str, int]]:
    """How often the run of each trial was started, by name."""

    def count(folder: Path) -> dict[str, int]:
        files = sorted((folder / "trials").glob("*/environment.json"))
        return {path.parent.name: len(json.loads(path.read_text())) for path in files}

    return count
