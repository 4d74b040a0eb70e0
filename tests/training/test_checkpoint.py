"""Checkpoints: any split reads any other, a damaged one is found and never used, a failed write leaves nothing."""

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings, strategies as st
from torch import Tensor

from megadit import engines
from megadit.engines.base import Engine
from megadit.recipe import Recipe
from megadit.training import checkpoint
from megadit.training.checkpoint import CheckpointError
from megadit.training.ema import Averages
from megadit.training.flat_range import FlatRange

NAMES = ["images-0000000016", "images-0000000032", "images-0000000048"]


def save(folder: Path, engine: Engine, step: int, keep: int = 5) -> Path:
    """A checkpoint whose weights are all `step`, its average all `step + 0.5`, its moments `-step` and `2 * step`."""
    averages = Averages(engine.shards, [0.9])
    for name, shard in engine.shards.items():
        shard.values.fill_(step)
        averages.by_name()["ema_0.9"][name].fill_(step + 0.5)
        first, second = engine.moments()[name]
        first.fill_(-step)
        second.fill_(2 * step)
    return checkpoint.save(folder, engine, averages, images_seen=16 * step, num_steps=step, keep=keep)


@pytest.fixture(scope="module")
def engine(tiny_recipe: Callable[..., Recipe]) -> Engine:
    return engines.build(tiny_recipe())


@pytest.fixture(scope="module")
def three(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three checkpoints."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    for step in (1, 2, 3):
        save(folder, engine, step)
    return folder


@pytest.fixture
def folder(three: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(three, tmp_path / "checkpoints")


# Splits


@pytest.fixture(scope="module")
def split_on_three_ranks(
    run_ranks: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    """60 tensors of all sizes, each cut at random places (some ranks own nothing) and saved by three ranks."""
    draw = random.Random(0)
    sizes = [1, 2, 3] + [draw.randrange(1, 200) for _ in range(57)]
    tensors = {f"t{number}": torch.randn(size) for number, size in enumerate(sizes)}
    cuts = {
        name: [0, *sorted(draw.randint(0, whole.numel()) for _ in range(2)), whole.numel()]
        for name, whole in tensors.items()
    }
    folder = tmp_path_factory.mktemp("split")
    run_ranks("save_ranges.py", 3, tensors=tensors, cuts=cuts, folder=folder)
    return folder, tensors


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_range_of_any_split_is_read_back(
    split_on_three_ranks: tuple[Path, dict[str, Tensor]], data: st.DataObject
) -> None:
    folder, tensors = split_on_three_ranks
    ranges = {}
    for name, whole in tensors.items():
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
        ranges[name] = (start, end, torch.full((end - start,), torch.nan))
    state = {n: FlatRange.of(values, start, tensors[n].numel()) for n, (start, _, values) in ranges.items()}
    with pytest.warns(UserWarning, match="distributed is disabled"):
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    for name, (start, end, values) in ranges.items():
        assert torch.equal(values, tensors[name][start:end])


def test_everything_that_was_saved_is_loaded(three: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    other = engines.build(tiny_recipe())
    averages = Averages(other.shards, [0.9])
    header = checkpoint.load(three / NAMES[1], other, averages)
    assert (header.images_seen, header.num_steps) == (32, 2)
    for name, shard in other.shards.items():
        first, second = other.moments()[name]
        found = [shard.values, averages.by_name()["ema_0.9"][name], first, second]
        assert [values.unique().tolist() for values in found] == [[2.0], [2.5], [-2.0], [4.0]]


# Damage


def cut_short(path: Path) -> str:
    file = path / "__0_0.distcp"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 7)
    return f"__0_0.distcp has {size - 7} bytes instead of {size}"


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def flip_in_data(path: Path) -> str:
    flip(path / "__0_0.distcp", 50_000)
    return "__0_0.distcp has changed (its CRC-32 differs)"


def flip_in_metadata(path: Path) -> str:
    flip(path / ".metadata", 1000)
    return ".metadata has changed (its CRC-32 differs)"


def lose_a_file(path: Path) -> str:
    (path / "__0_0.distcp").unlink()
    return "__0_0.distcp is missing"


def half_a_header(path: Path) -> str:
    header = path / "checkpoint.json"
    header.write_bytes(header.read_bytes()[: header.stat().st_size // 2])
    return "checkpoint.json cannot be read"


def lose_the_header(path: Path) -> str:
    (path / "checkpoint.json").unlink()
    return "checkpoint.json cannot be read"


DAMAGES = [cut_short, flip_in_data, flip_in_metadata, lose_a_file, half_a_header, lose_the_header]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_one_is_used(
    damage: Callable[[Path], str], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reason = damage(folder / NAMES[2])
    with caplog.at_level(logging.WARNING, logger="megadit"):
        assert checkpoint.newest_valid(folder) == folder / NAMES[1]
    (record,) = [record for record in caplog.records if record.name.startswith("megadit")]
    assert str(folder / NAMES[2]) in record.getMessage()
    assert reason in record.getMessage()


def test_a_flipped_bit_anywhere_in_the_header_is_found(folder: Path) -> None:
    header = folder / NAMES[0] / "checkpoint.json"
    whole = header.read_bytes()
    for position in random.Random(1).sample(range(len(whole)), 200):
        flip(header, position)
        assert checkpoint.find_damage(header.parent), f"byte {position}"
        header.write_bytes(whole)
    assert checkpoint.find_damage(header.parent) is None


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(folder: Path) -> None:
    for name in NAMES:
        cut_short(folder / name)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole .*has \d+ bytes instead of \d+.*--run"):
        checkpoint.newest_valid(folder)
    assert checkpoint.newest_valid(folder.parent / "of a new run") is None


def test_a_checkpoint_written_again_replaces_the_damaged_one(folder: Path, engine: Engine) -> None:
    cut_short(folder / NAMES[2])
    save(folder, engine, 3)
    assert checkpoint.newest_valid(folder) == folder / NAMES[2]


def test_a_half_written_checkpoint_is_ignored_and_removed(folder: Path, engine: Engine) -> None:
    shutil.copytree(folder / NAMES[2], folder / ".partial-images-0000000064")
    assert checkpoint.newest_valid(folder) == folder / NAMES[2]
    save(folder, engine, 5)
    assert sorted(path.name for path in folder.iterdir()) == [*NAMES, "images-0000000080"]


def test_only_the_newest_are_kept(folder: Path, engine: Engine) -> None:
    save(folder, engine, 4, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == [NAMES[2], "images-0000000064"]


# What a user can get wrong


@pytest.mark.parametrize(
    ("overrides", "full_rank"),
    [((), 0), (("engine.kind=fsdp", "engine.num_ranks=2"), 1)],
    ids=["single", "rank 1 of 2"],
)
def test_no_space_for_a_checkpoint(
    overrides: tuple[str, ...], full_rank: int, run_ranks: Callable, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe(*overrides)
    said = run_ranks("full_disk.py", recipe.engine.num_ranks, recipe=recipe, folder=tmp_path, full_rank=full_rank)
    assert len(set(said)) == 1
    assert said[0].startswith(f"cannot write checkpoint {tmp_path / NAMES[1]}: ")
    assert "File too large" in said[0]
    assert said[0].endswith(f"newest whole checkpoint: {tmp_path / NAMES[0]}")
    assert "\n" not in said[0]
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]
    assert checkpoint.find_damage(tmp_path / NAMES[0]) is None


def test_a_checkpoint_of_another_width_is_refused(three: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    wider = engines.build(tiny_recipe("model.width=96"))
    before = {name: shard.values.clone() for name, shard in wider.shards.items()}
    with pytest.raises(
        CheckpointError, match=r"another model: \d+ parameters differ: .*\[\d*64.* there, \[\d*96.* here"
    ):
        checkpoint.load(three / NAMES[0], wider, Averages(wider.shards, [0.9]))
    assert all(torch.equal(before[name], shard.values) for name, shard in wider.shards.items())


def test_unknown_weights_are_refused_with_those_there_are(three: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights 'ema_0\.5'; there are: weight, ema_0\.9"):
        checkpoint.read_tensors(three / NAMES[0], "ema_0.5")
