"""Copies of checkpoints in S3, over the real protocol: whole or not used, and only by the run that made them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megadit import engines
from megadit.data.storage import StorageError, open_store
from megadit.distributed import ALONE
from megadit.engines.base import Engine
from megadit.recipe import Recipe
from megadit.training import checkpoint, trainer
from megadit.training.checkpoint import CheckpointError, Saver, copies
from megadit.training.ema import Averages

NAMES = ["images-0000000016", "images-0000000032"]


@pytest.fixture(scope="module")
def engine(tiny_recipe: Callable[..., Recipe]) -> Engine:
    return engines.build(tiny_recipe(), ALONE)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "PIECE_BYTES", 300_000)


@pytest.fixture
def make_saver(engine: Engine, tiny_recipe: Callable[..., Recipe], s3_bucket: str) -> Callable[..., Saver]:
    averages = Averages(engine.shards, [0.9])
    url = f"checkpoints.copy_url={s3_bucket}/runs/a"
    return lambda run, *overrides: Saver(run, tiny_recipe(url, *overrides), engine, averages)


@pytest.fixture
def newest(tiny_recipe: Callable[..., Recipe], s3_bucket: str) -> Callable[..., Path | None]:
    """The checkpoint that a run begins with."""
    url = f"checkpoints.copy_url={s3_bucket}/runs/a"
    return lambda run, *overrides: checkpoint.newest_of_run(run, tiny_recipe(url, *overrides), ALONE)


@pytest.fixture
def two_copies(make_saver: Callable[..., Saver], tmp_path: Path) -> Path:
    """The run that made them."""
    with make_saver(tmp_path / "run") as saver:
        saver.save(16, 1)
        saver.save(32, 2)
    return tmp_path / "run"


def test_a_run_without_checkpoints_gets_the_newest_copy(
    two_copies: Path, newest: Callable[..., Path | None], tmp_path: Path
) -> None:
    path = newest(tmp_path / "elsewhere")
    assert path == tmp_path / "elsewhere" / "checkpoints" / NAMES[1]
    original = two_copies / "checkpoints" / NAMES[1]
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in original.iterdir()}


def test_a_run_with_a_checkpoint_of_its_own_goes_on_from_that(
    two_copies: Path, make_saver: Callable[..., Saver], newest: Callable[..., Path | None], tmp_path: Path
) -> None:
    with make_saver(tmp_path / "elsewhere", "checkpoints.copy_url=null") as saver:
        saver.save(16, 1)
    assert newest(tmp_path / "elsewhere") == tmp_path / "elsewhere" / "checkpoints" / NAMES[0]


@pytest.mark.parametrize("name", ["checkpoint.json", "rank-0.bin.00001"])
def test_the_copy_before_a_damaged_one_is_used(
    name: str, two_copies: Path, newest: Callable[..., Path | None], s3_bucket: str, tmp_path: Path
) -> None:
    store = open_store(f"{s3_bucket}/runs/a/{NAMES[1]}")
    content = bytearray(store.get(name))
    content[len(content) // 2] ^= 1
    store.put(name, bytes(content))
    path = newest(tmp_path / "elsewhere")
    assert path is not None
    assert path.name == NAMES[0]
    assert [p.name for p in path.parent.iterdir()] == [NAMES[0]]
    assert checkpoint.find_damage(path) is None


def test_the_copy_of_another_recipe_is_refused(
    two_copies: Path, newest: Callable[..., Path | None], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"of another recipe \(seed: 0 there, 7 now \(.*checkpoints\.copy_url"):
        newest(tmp_path / "elsewhere", "seed=7")


def test_copies_are_kept_as_the_run_keeps_its_own(
    make_saver: Callable[..., Saver], newest: Callable[..., Path | None], s3_bucket: str, tmp_path: Path
) -> None:
    """And a copy without a header goes with the next one, as it is left when a run is killed while it copies."""
    store = open_store(f"{s3_bucket}/runs/a")
    with make_saver(tmp_path / "run", "checkpoints.keep=1", "checkpoints.keep_every_images=40") as saver:
        for step in range(1, 6):
            saver.save(16 * step, step)
            saver.wait()
            if step == 2:
                store.put("images-0000000008/rank-0.bin.00000", b"of a killed run")
    names = {name.split("/")[0] for name in store.list() if "/" in name}
    assert names == {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"images-0000000048", "images-0000000080"}
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert newest(tmp_path / "run") is not None  # whole


def test_a_copy_is_none_as_soon_as_its_removal_begins(
    two_copies: Path,
    newest: Callable[..., Path | None],
    tiny_recipe: Callable[..., Recipe],
    s3_bucket: str,
    tmp_path: Path,
) -> None:
    """As where the run is killed, or may not remove: here after the first object."""
    copies_of_run = copies.Copies(f"{s3_bucket}/runs/a", tiny_recipe())

    def lose_connection() -> None:
        raise StorageError("connection lost")

    with pytest.raises(StorageError, match="connection lost"):
        copies_of_run.prune(NAMES[1], 1, None, lose_connection)
    left = list(open_store(f"{s3_bucket}/runs/a").list(NAMES[0]))
    assert left
    assert f"{NAMES[0]}/checkpoint.json" not in left
    path = newest(tmp_path / "elsewhere")
    assert path is not None
    assert path.name == NAMES[1]
    copies_of_run.prune(NAMES[1], 1, None, lambda: None)
    assert not list(open_store(f"{s3_bucket}/runs/a").list(NAMES[0]))


def test_a_copy_that_fails_is_an_error_only_at_the_end(
    make_saver: Callable[..., Saver],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    saver = make_saver(tmp_path / "run")
    saver.save(16, 1)
    saver.save(32, 2)
    with pytest.raises(CheckpointError, match=r"could not be copied: .*credentials.*it is whole in"):
        saver.__exit__(None, None, None)
    assert f"checkpoint {NAMES[0]} could not be copied" in caplog.text
    assert checkpoint.find_damage(tmp_path / "run" / "checkpoints" / NAMES[1]) is None


def test_a_run_goes_on_on_another_machine(tiny_recipe: Callable[..., Recipe], s3_bucket: str, tmp_path: Path) -> None:
    """The second half of the run, elsewhere, from the copy of its first half."""
    copying = f"checkpoints.copy_url={s3_bucket}/run"
    recipe = tiny_recipe("training.num_images=32", "validation=null", "checkpoints.every_images=16", copying)
    assert trainer.train(recipe, tmp_path / "one") == 0
    store = open_store(f"{s3_bucket}/run/{NAMES[1]}")
    store.put("checkpoint.json", b"{}")  # as if the machine had been lost before this one was copied
    assert trainer.train(recipe, tmp_path / "other") == 0
    ours, theirs = (
        checkpoint.read_tensors(tmp_path / run / "checkpoints" / NAMES[1], "ema_0.9") for run in ("one", "other")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "other" / "metrics.jsonl").read_text().count('"kind": "train"') == 1
