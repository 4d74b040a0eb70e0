"""Training at several aspect ratios: one curve on any number of ranks, from pictures as they were found or packed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadit.data import sa1b_like
from megadit.data.format.manifest import Manifest
from megadit.data.indexing.captions import CaptionTable
from megadit.data.indexing.dataset import index
from megadit.data.loading.loader import Loader
from megadit.data.packing.pack import pack
from megadit.data.packing.settings import PackSettings
from megadit.data.packing.sources import open_source
from megadit.recipe import Recipe, load
from megadit.training.data_fits import check_data_fits

RAW = ("data.resolution=64", "data.aspect_buckets=true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as they were found (`raw`), and packed into buckets (`packed/train`)."""
    root = tmp_path_factory.mktemp("aspects")
    sa1b_like.make(str(root / "tars"), 96, samples_per_tar=32, short_side=64, num_masks=1)
    index(
        str(root / "tars"), str(root / "raw"), captions=CaptionTable(str(root / "tars" / "captions.jsonl")), workers=1
    )
    settings = PackSettings(size=64, aspect_buckets=True, shard_samples=16, holdout=0)
    assert pack(open_source(str(root / "raw")), str(root / "packed"), settings)
    return root


@pytest.fixture(scope="module")
def recipe(folder: Path, t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """PixArt on pixels, one text encoder online."""
    path = tmp_path_factory.mktemp("recipes") / "aspects.yaml"
    path.write_text(f"""\
name: aspects
model: {{family: pixart, input_size: 64, in_channels: 3, patch_size: 16, width: 32, depth: 2, head_dim: 16,
  text_dim: 16, max_text_tokens: 24, learn_sigma: false}}
parametrization: {{kind: mup, base_width: 16}}
data: {{url: "{folder}/raw", validation_url: "{folder}/raw", num_streams: 2, chunk_samples: 2, chunks_per_group: 2}}
encoders: {{text: "{t5_folder}", max_tokens: 24}}
optimizer: {{lr: 2^-7}}
training: {{num_images: 64, batch_size: 8, ema_rates: [0.9], log_every_steps: 1}}
checkpoints: {{every_images: 64}}
validation: {{every_images: 64, num_timesteps: 2, batch_size: 5}}
""")
    return lambda *overrides: load(path, overrides)


@pytest.fixture(scope="module")
def single(recipe: Callable[..., Recipe], train: Callable) -> Any:
    return train(recipe(*RAW))


def test_steps_have_several_shapes(recipe: Callable[..., Recipe]) -> None:
    raw = recipe(*RAW)
    stream = Loader(raw.data, raw.seed, 8, 0, 1)
    shapes = [tuple(batch.images.shape[2:]) for batch, _ in zip(stream.iterate(0), range(8), strict=False)]
    assert len(set(shapes)) > 1
    assert all(height % 16 == width % 16 == 0 for height, width in shapes)


def test_two_ranks_give_the_curve_of_one(recipe: Callable[..., Recipe], train: Callable, single: Any) -> None:
    run = train(recipe(*RAW, "engine.kind=fsdp", "engine.num_ranks=2"))
    assert run.curve()["loss"] == pytest.approx(single.curve()["loss"], rel=1e-5)
    assert run.validation() == pytest.approx(single.validation(), rel=1e-5)


def test_packed_buckets_train(folder: Path, recipe: Callable[..., Recipe], train: Callable) -> None:
    run = train(recipe(f"data.url={folder}/packed/train", f"data.validation_url={folder}/packed/train"))
    assert len(run.curve()["loss"]) == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.input_size=32"], r"buckets of far more or fewer tokens than model.input_size 32: "),
        (["model.patch_size=32"], r"has sizes that model.patch_size 32 does not divide: .*48x80"),
    ],
)
def test_buckets_that_do_not_fit(
    folder: Path, recipe: Callable[..., Recipe], overrides: list[str], message: str
) -> None:
    chosen = recipe(*RAW, *overrides)
    with pytest.raises(ValueError, match=message):
        check_data_fits(chosen, Manifest.load(chosen.data.url))
