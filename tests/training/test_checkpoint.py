"""Checkpoints: any split reads any other, a damaged one is found and never used, a failed write leaves nothing."""

import json
import logging
import random
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings, strategies as st
from torch import Tensor

from megadit import engines
from megadit.distributed import ALONE
from megadit.engines.base import Engine
from megadit.recipe import Recipe
from megadit.training import checkpoint
from megadit.training.checkpoint import CheckpointError, DamageError, Saver, extents, folders
from megadit.training.checkpoint.flat_range import FlatRange
from megadit.training.checkpoint.reader import Reader
from megadit.training.ema import Averages

NAMES = ["images-0000000016", "images-0000000032", "images-0000000048"]


@pytest.fixture(scope="module")
def engine(tiny_recipe: Callable[..., Recipe]) -> Engine:
    return engines.build(tiny_recipe(), ALONE)


@pytest.fixture(scope="module")
def save(engine: Engine, tiny_recipe: Callable[..., Recipe]) -> Callable[..., None]:
    """Save steps: weights that are all `step`, an average of `step + 0.5`, moments of `-step` and `2 * step`."""

    def save_steps(run: Path, *steps: int, **settings: Any) -> None:
        averages = Averages(engine.shards, [0.9])
        recipe = tiny_recipe("checkpoints.keep=5", *(f"checkpoints.{key}={value}" for key, value in settings.items()))
        with Saver(run, recipe, engine, averages) as saver:
            for step in steps:
                fill(engine, averages, step)
                saver.save(images_seen=16 * step, num_steps=step)

    return save_steps


def fill(engine: Engine, averages: Averages, step: int) -> None:
    for name, shard in engine.shards.items():
        shard.values.fill_(step)
        averages.by_name()["ema_0.9"][name].fill_(step + 0.5)
        first, second = engine.optimizer_state()[name].values()
        first.fill_(-step)
        second.fill_(2 * step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def three(save: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three checkpoints."""
    run = tmp_path_factory.mktemp("three")
    save(run, 1, 2, 3)
    return run / "checkpoints"


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
    ranges = [{name: tuple(cuts[name][rank : rank + 2]) for name in tensors} for rank in range(3)]
    folder = tmp_path_factory.mktemp("split")
    run_ranks("save_ranges.py", 3, tensors=tensors, ranges=ranges, folder=folder)
    (path,) = checkpoint.newest_first(folder)
    return path, tensors


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_range_of_any_split_is_read_back(
    split_on_three_ranks: tuple[Path, dict[str, Tensor]], data: st.DataObject
) -> None:
    path, tensors = split_on_three_ranks
    ranges = {}
    for name, whole in tensors.items():
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
        ranges[name] = (start, end, torch.full((end - start,), torch.nan))
    state = {
        f"weight/{name}": FlatRange.of(values, start, tensors[name].numel())
        for name, (start, _, values) in ranges.items()
    }
    dcp.load(state, storage_reader=Reader(path), no_dist=True)
    for name, (start, end, values) in ranges.items():
        assert torch.equal(values, tensors[name][start:end])


def test_everything_that_was_saved_is_loaded(three: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    other = engines.build(tiny_recipe(), ALONE)
    averages = Averages(other.shards, [0.9])
    header = checkpoint.load(three / NAMES[1], other, averages)
    assert (header.images_seen, header.num_steps) == (32, 2)
    for name, shard in other.shards.items():
        first, second = other.optimizer_state()[name].values()
        found = [shard.values, averages.by_name()["ema_0.9"][name], first, second]
        assert [values.unique().tolist() for values in found] == [[2.0], [2.5], [-2.0], [4.0]]


# Damage


def cut_short(path: Path) -> str:
    file = path / "rank-0.bin"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 7)
    return f"rank-0.bin has {size - 7} bytes instead of {size}"


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def flip_in_data(path: Path) -> str:
    flip(path / "rank-0.bin", 50_000)
    return "rank-0.bin has changed (its CRC-32 differs)"


def flip_in_metadata(path: Path) -> str:
    flip(path / ".metadata", 1000)
    return ".metadata has changed (its CRC-32 differs)"


def lose_a_file(path: Path) -> str:
    (path / "rank-0.bin").unlink()
    return "rank-0.bin is missing"


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


@pytest.mark.parametrize("damage", DAMAGES)
def test_loading_finds_damage_and_takes_the_one_before(
    damage: Callable[[Path], str], folder: Path, tiny_recipe: Callable[..., Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    """In one reading; nothing of the damaged one is left in the state."""
    reason = damage(folder / NAMES[2])
    other = engines.build(tiny_recipe(), ALONE)
    averages = Averages(other.shards, [0.9])
    with pytest.raises(DamageError, match=re.escape(reason)):
        checkpoint.load(folder / NAMES[2], other, averages)
    path, header = checkpoint.load_or_before(folder / NAMES[2], other, averages)
    assert path == folder / NAMES[1]
    assert (header.images_seen, header.num_steps) == (32, 2)
    assert reason in caplog.text
    for name, shard in other.shards.items():
        first, second = other.optimizer_state()[name].values()
        found = [shard.values, averages.by_name()["ema_0.9"][name], first, second]
        assert [values.unique().tolist() for values in found] == [[2.0], [2.5], [-2.0], [4.0]]


def test_a_part_of_a_large_extent_is_read_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 100 bytes; damage shows where it is in a block that is touched, and only there."""
    monkeypatch.setattr(extents, "BLOCK_BYTES", 100)
    data = torch.randint(256, (1050,), dtype=torch.uint8)
    with (tmp_path / "file").open("wb") as file, ThreadPoolExecutor(2) as pool:
        file.write(bytes(64))
        file.flush()
        extent = extents.write(file.fileno(), "file", 64, data, pool)
    assert len(extent.crcs) == 11
    flip(tmp_path / "file", 64 + 450)
    for start, end in [(0, 400), (0, 1), (399, 400), (500, 1050), (1049, 1050), (730, 731), (560, 890), (7, 7)]:
        target = torch.zeros(end - start, dtype=torch.uint8)
        extents.read(tmp_path, [extents.Read(extent, start, end, target)])
        assert torch.equal(target, data[start:end])
    for start, end in [(0, 401), (499, 500), (0, 1050), (420, 430)]:
        with pytest.raises(DamageError, match=r"^file has changed \(its CRC-32 differs\)$"):
            extents.read(tmp_path, [extents.Read(extent, start, end, torch.zeros(end - start, dtype=torch.uint8))])


def test_a_checkpoint_of_another_format_is_refused_and_not_gone_back_before(folder: Path) -> None:
    path = folder / NAMES[2] / "checkpoint.json"
    header = json.loads(path.read_text())["header"] | {"format": 1}
    path.write_text(json.dumps({"crc32": zlib.crc32(json.dumps(header).encode()), "header": header}))
    with pytest.raises(CheckpointError, match=r"checkpoint format 1, this version of megadit reads 2; go on with"):
        checkpoint.newest_valid(folder)


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


def test_a_checkpoint_written_again_replaces_the_damaged_one(folder: Path, save: Callable[..., None]) -> None:
    cut_short(folder / NAMES[2])
    save(folder.parent, 3)
    assert checkpoint.newest_valid(folder) == folder / NAMES[2]


def test_a_half_written_checkpoint_is_ignored_and_removed(folder: Path, save: Callable[..., None]) -> None:
    shutil.copytree(folder / NAMES[2], folder / ".partial-images-0000000064")
    assert checkpoint.newest_valid(folder) == folder / NAMES[2]
    save(folder.parent, 5)
    assert names(folder) == [*NAMES, "images-0000000080"]


def test_only_the_newest_are_kept(folder: Path, save: Callable[..., None]) -> None:
    save(folder.parent, 4, keep=2)
    assert names(folder) == [NAMES[2], "images-0000000064"]


def test_the_first_of_every_interval_stays(tmp_path: Path, save: Callable[..., None]) -> None:
    """With steps of 16 images and intervals of 40: from 48, 80 and 128 on."""
    save(tmp_path, *range(1, 10), keep=1, keep_every_images=40)
    assert names(tmp_path / "checkpoints") == [f"images-{images:010d}" for images in (48, 80, 128, 144)]


# What a user can get wrong


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize(
    ("overrides", "full_rank"),
    [((), 0), (("engine.kind=fsdp", "engine.num_ranks=2"), 1)],
    ids=["single", "rank 1 of 2"],
)
def test_no_space_for_a_checkpoint(
    overrides: tuple[str, ...],
    full_rank: int,
    asynchronous: bool,
    run_ranks: Callable,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe(*overrides, f"checkpoints.asynchronous={asynchronous}")
    said = run_ranks("full_disk.py", recipe.engine.num_ranks, recipe=recipe, run=tmp_path, full_rank=full_rank)
    assert len(set(said)) == 1
    assert said[0].startswith(f"cannot write checkpoint {tmp_path / 'checkpoints' / NAMES[1]}: ")
    assert "File too large" in said[0]
    assert said[0].endswith(f"newest whole checkpoint: {tmp_path / 'checkpoints' / NAMES[0]}")
    assert "\n" not in said[0]
    assert names(tmp_path / "checkpoints") == [NAMES[0]]
    assert checkpoint.find_damage(tmp_path / "checkpoints" / NAMES[0]) is None


def test_a_checkpoint_of_another_width_is_refused(three: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    wider = engines.build(tiny_recipe("model.width=96"), ALONE)
    before = {name: shard.values.clone() for name, shard in wider.shards.items()}
    with pytest.raises(
        CheckpointError, match=r"another model: \d+ parameters differ: .*\[\d*64.* there, \[\d*96.* here"
    ):
        checkpoint.load(three / NAMES[0], wider, Averages(wider.shards, [0.9]))
    assert all(torch.equal(before[name], shard.values) for name, shard in wider.shards.items())


def test_unknown_weights_are_refused_with_those_there_are(three: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights 'ema_0\.5'; there are: weight, ema_0\.9"):
        checkpoint.read_tensors(three / NAMES[0], "ema_0.5")


def test_a_header_that_says_no_slots_is_of_adamw(save: Callable[..., None], engine: Engine, tmp_path: Path) -> None:
    """As versions wrote it that had no other optimizer."""
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / NAMES[0]
    tree = json.loads((path / "checkpoint.json").read_text())["header"]
    assert tree.pop("slots") == ["exp_avg", "exp_avg_sq"]
    sealed = {"header": tree, "crc32": folders._crc32_of_tree(tree)}
    (path / "checkpoint.json").write_text(json.dumps(sealed))
    assert checkpoint.load(path, engine, Averages(engine.shards, [0.9])).num_steps == 1


def test_the_state_of_another_optimizer_is_refused(save: Callable[..., None], engine: Engine, tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / NAMES[0]
    tree = json.loads((path / "checkpoint.json").read_text())["header"] | {"slots": ["average"]}
    (path / "checkpoint.json").write_text(json.dumps({"header": tree, "crc32": folders._crc32_of_tree(tree)}))
    with pytest.raises(CheckpointError, match=r"another optimizer: average there, exp_avg, exp_avg_sq here"):
        checkpoint.load(path, engine, Averages(engine.shards, [0.9]))


def test_what_a_resume_went_back_before_does_not_count(save: Callable[..., None], tmp_path: Path) -> None:
    """The newest is damaged, so the run goes on from the one before and is stopped: what it then writes is older."""
    save(tmp_path, 1, 2, 5)
    folder = tmp_path / "checkpoints"
    damaged = folder / "images-0000000080" / "rank-0.bin"
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    assert checkpoint.newest_valid(folder) == folder / NAMES[1]
    save(tmp_path, 3, keep=1)
    assert checkpoint.newest_valid(folder) == folder / NAMES[2]
    assert sorted(path.name for path in folder.iterdir()) == [NAMES[2], "images-0000000080"]


def test_one_that_lacks_a_file_does_not_count(save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    (folder / NAMES[1] / "rank-0.bin").unlink()
    save(tmp_path, 3, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert checkpoint.newest_valid(folder) == folder / NAMES[2]
