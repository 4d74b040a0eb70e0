"""Saving beside training: what is written is the moment of the save, one at a time, and each range once."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megadit import engines
from megadit.distributed import ALONE
from megadit.engines.base import Engine
from megadit.recipe import Recipe, RecipeError
from megadit.training import checkpoint
from megadit.training.checkpoint import CheckpointError, Saver
from megadit.training.ema import Averages

NAMES = ["images-0000000016", "images-0000000032"]


@pytest.fixture(scope="module")
def engine(tiny_recipe: Callable[..., Recipe]) -> Engine:
    return engines.build(tiny_recipe(), ALONE)


@pytest.fixture
def make_saver(engine: Engine, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Saver]:
    averages = Averages(engine.shards, [0.9])
    return lambda *overrides: Saver(tmp_path, tiny_recipe(*overrides), engine, averages)


@pytest.fixture
def held_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that takes nothing until the event is set."""
    released = threading.Event()
    write = os.pwrite

    def wait_and_write(*arguments: Any) -> int:
        assert released.wait(60)
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", wait_and_write)
    yield released
    released.set()


def fill(engine: Engine, value: float) -> None:
    for shard in engine.shards.values():
        shard.values.fill_(value)


def values_in(path: Path) -> list[float]:
    tensors = checkpoint.read_tensors(path, "weight").values()
    return torch.cat([tensor.flatten() for tensor in tensors]).unique().tolist()


def test_training_goes_on_while_the_state_of_the_save_is_written(
    engine: Engine, make_saver: Callable[..., Saver], held_disk: threading.Event, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    with make_saver() as saver:
        fill(engine, 1)
        saver.save(16, 1)  # returns, though the disk takes nothing
        fill(engine, 2)
        assert checkpoint.newest_first(folder) == []
        held_disk.set()
        saver.save(32, 2)  # the first one is written before the second is begun
        assert (folder / NAMES[0]).is_dir()
        fill(engine, 3)
    assert [values_in(folder / name) for name in NAMES] == [[1.0], [2.0]]


def test_a_synchronous_save_returns_when_it_is_written(make_saver: Callable[..., Saver], tmp_path: Path) -> None:
    with make_saver("checkpoints.asynchronous=false") as saver:
        saver.save(16, 1)
        assert checkpoint.find_damage(tmp_path / "checkpoints" / NAMES[0]) is None


def test_a_failed_write_is_raised_by_the_next_save(make_saver: Callable[..., Saver], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    saver = make_saver()
    saver.save(16, 1)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*images-0000000016.*newest whole .* none"):
        saver.save(32, 2)


def test_the_error_that_ends_a_run_hides_no_other_and_is_not_hidden(
    make_saver: Callable[..., Saver], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")

    def diverge() -> None:
        with make_saver() as saver:
            saver.save(16, 1)
            raise ArithmeticError("the run diverged")

    with pytest.raises(ArithmeticError, match="the run diverged"):
        diverge()
    assert "cannot write checkpoint" in caplog.text


def test_the_time_that_training_stood_still_is_logged(
    make_saver: Callable[..., Saver], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="megadit"), make_saver() as saver:
        saver.save(16, 1)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("megadit")]
    assert said.startswith(f"checkpoint {NAMES[0]}: ")
    assert "for which training stood still for 0." in said


def test_an_address_that_is_none_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"checkpoints\.copy_url.*s3://bucket/prefix"):
        tiny_recipe("checkpoints.copy_url=http://host/x")


def test_replicas_write_each_range_once(run_ranks: Callable, tmp_path: Path) -> None:
    """Four ranks as HSDP has them: two replicas of two shards."""
    tensors = {f"t{number}": torch.randn(100_000 + number) for number in range(8)}
    halves = {name: [(0, 60_000), (60_000, whole.numel())] for name, whole in tensors.items()}
    ranges = [{name: halves[name][rank % 2] for name in tensors} for rank in range(4)]
    run_ranks("save_ranges.py", 4, tensors=tensors, ranges=ranges, folder=tmp_path)
    (path,) = checkpoint.newest_first(tmp_path)
    header = checkpoint.read_header(path)
    num_bytes = sum(4 * whole.numel() for whole in tensors.values())
    assert num_bytes < header.num_bytes < 1.05 * num_bytes
    sizes = [header.files[f"rank-{rank}.bin"] for rank in range(4)]
    assert max(sizes) < 0.4 * sum(sizes)  # and the replicas share the work
    found = checkpoint.read_tensors(path, "weight")
    assert all(torch.equal(found[name], whole) for name, whole in tensors.items())
