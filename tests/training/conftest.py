"""Runs of the tiny recipe, and what they leave behind."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megadit.recipe import Recipe, load
from megadit.training import checkpoint, trainer


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Path
    status: int = 0

    def lines(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def curve(self) -> dict[str, list[float]]:
        """step, loss and grad_norm of every step, in the order of the file."""
        return {key: [line[key] for line in self.lines("train")] for key in ("step", "loss", "grad_norm")}

    def validation(self) -> dict[str, float]:
        """The last validation loss of each set of weights."""
        return {line["weights"]: line["loss"] for line in self.lines("validation")}

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").iterdir())

    def largest_difference(self, other: "Run", kind: str = "ema_0.9") -> float:
        """Of the tensors of one kind in the last checkpoints: the norm of the difference over the norm, at most.

        Not by element: Adam divides by the square root of a second moment that is next to nothing for a few.
        """
        ours, theirs = (checkpoint.read_tensors(run.checkpoints()[-1], kind) for run in (self, other))
        assert ours.keys() == theirs.keys()
        return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)

    def assert_continues_as(self, reference: "Run") -> None:
        """The run that was interrupted has every step once, and ends as the one that was not."""
        curve, expected = self.curve(), reference.curve()
        assert curve["step"] == expected["step"]
        assert curve["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert curve["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert self.validation() == pytest.approx(reference.validation(), rel=1e-5)
        for kind in ("weight", "ema_0.9"):
            assert self.largest_difference(reference, kind) < 1e-4


@pytest.fixture(scope="session")
def train(run_ranks: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Train a recipe on as many ranks as it asks for, in a new folder or in `run`."""

    def start(recipe: Recipe, run: Path | None = None, resume: str = "auto") -> Run:
        run = run or tmp_path_factory.mktemp("runs") / "run"
        if recipe.engine.kind == "single":
            return Run(run, trainer.train(recipe, run, resume=resume))
        statuses = run_ranks("train.py", recipe.engine.num_ranks, recipe=recipe, run=run, resume=resume)
        assert len(set(statuses)) == 1, statuses
        return Run(run, statuses[0])

    return start


@pytest.fixture(scope="session")
def finished(train: Callable[..., Run], tiny_recipe: Callable[..., Recipe]) -> Callable[..., Run]:
    """The uninterrupted run with some overrides. It is shared: tests that go on from it make a copy."""
    return cache(lambda *overrides: train(tiny_recipe(*overrides)))


@pytest.fixture(scope="session")
def reference(finished: Callable[..., Run]) -> Run:
    """The uninterrupted run of a single process."""
    return finished()


@pytest.fixture(scope="session")
def staged_yaml(tiny_yaml: Path, pack_animals: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe at 16 pixels, 8 steps of 16, and then at 24, 12 steps of 8 in micro-batches."""
    folder = tmp_path_factory.mktemp("larger")
    pack_animals(str(folder), size=24)
    path = tmp_path_factory.mktemp("recipes") / "staged.yaml"
    path.write_text(f"""\
extends: {tiny_yaml}
name: staged
training: {{num_images: 128, ema_power_stds: [0.1]}}
checkpoints: {{every_images: 48, keep: 10}}
validation: {{every_images: 1000, num_timesteps: 1}}
stages:
  - name: low
  - name: high
    data: {{url: "file://{folder}/train", validation_url: "file://{folder}/validation"}}
    model: {{input_size: 24}}
    optimizer: {{lr: 2^-8, schedule: constant, warmup_steps: 2}}
    objective: {{logit_mean: 0.5, condition_dropout: 0.1}}
    training: {{num_images: 96, batch_size: 8, micro_batch_size: 4}}
    engine: {{activation_checkpointing: full}}
""")
    return path


@pytest.fixture(scope="session")
def staged(staged_yaml: Path) -> Callable[..., Recipe]:
    """The recipe of two stages, with overrides."""
    return lambda *overrides: load(staged_yaml, overrides)


@pytest.fixture(scope="session")
def whole(staged: Callable[..., Recipe], train: Callable[..., Run]) -> Run:
    """Its uninterrupted run on a single process. It is shared: tests that go on from it make a copy."""
    return train(staged())
