"""Samples that are corrupt at rest, in a run: counted over all ranks, and told when there are more of them."""

import shutil
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from megadit.data.format.manifest import Manifest
from megadit.data.loading.chunks import ChunkReader
from megadit.data.loading.loader import Loader
from megadit.recipe import Recipe

RANKS = 2
STEPS = 8
NUM_BROKEN = 12  # of the first shard


@pytest.fixture
def broken(packed: Path, tmp_path: Path) -> list[str]:
    """The overrides that train on a data set whose first shard has corrupt samples."""
    copy = Path(shutil.copytree(packed, tmp_path / "packed"))
    shard = copy / "train" / Manifest.load(str(copy / "train")).shards[0].name
    data, places = bytearray(shard.read_bytes()), ChunkReader(str(copy / "train")).index.places["png"]
    for offset in places["offset"][: 4 * NUM_BROKEN : 4].tolist():
        data[offset + 50] ^= 1
    shard.write_bytes(data)
    return [f"data.url={copy}/train", f"training.num_images={16 * STEPS}", "validation=null"]


def test_every_rank_is_counted_and_each_rise_is_told(
    broken: list[str], tiny_recipe: Callable[..., Recipe], train: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = tiny_recipe(f"training.num_images={16 * STEPS}")
    sound = Loader(clean.data, clean.seed, clean.training.batch_size, 0, 1).iterate(0)
    corrupt = torch.arange(0, 4 * NUM_BROKEN, 4)
    # Which samples a step takes does not depend on their being sound.
    of_rank = torch.stack([torch.isin(next(sound).sample, corrupt).view(RANKS, -1).sum(1) for _ in range(STEPS)])
    sound.close()
    of_step = of_rank.sum(1).tolist()
    assert of_rank.sum(0).min() > 0  # of both ranks
    assert 0 in of_step

    ranks = ("engine.kind=fsdp", f"engine.num_ranks={RANKS}")
    run = train(tiny_recipe(*broken, *ranks, "data.max_corrupt_share=0.2"))
    assert [line["replaced_samples"] for line in run.lines("train")] == list(accumulate(of_step))
    told = [line for line in capsys.readouterr().out.splitlines() if "corrupt samples were replaced" in line]
    assert told == [
        f"{16 * (step + 1)} images  {count} corrupt samples were replaced by others ({total} since the start)"
        for step, (count, total) in enumerate(zip(of_step, accumulate(of_step), strict=True))
        if count
    ]


def test_a_sound_data_set_says_nothing_of_them(
    tiny_recipe: Callable[..., Recipe], train: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny_recipe("training.num_images=64", "training.log_every_steps=4", "validation=null"))
    assert [line["replaced_samples"] for line in run.lines("train")] == [0]
    assert "corrupt" not in capsys.readouterr().out
