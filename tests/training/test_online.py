"""Captions and pictures that are encoded in the trainer: what a run sees is what it sees of cached features."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megadit.batch import TENSORS
from megadit.data import sa1b_like
from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.indexing.captions import CaptionTable
from megadit.data.indexing.dataset import index
from megadit.data.loading.loader import Loader, validation_batches
from megadit.data.packing.pack import pack
from megadit.data.packing.settings import PackSettings
from megadit.data.packing.sources import open_source
from megadit.distributed import ALONE
from megadit.recipe import Recipe, RecipeError, load
from megadit.sampling.generate import sample
from megadit.training.online import OnlineEncoders, stream_draws_noise

MAX_TOKENS = 24


@pytest.fixture(scope="module")
def packs(vae_folder: Path, t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SA-1B-shaped tars, indexed with their captions; packed with features (`cached`) and as they are (`plain`)."""
    folder = tmp_path_factory.mktemp("packs")
    sa1b_like.make(str(folder / "tars"), 48, samples_per_tar=16, short_side=64, num_masks=2)
    captions = CaptionTable(str(folder / "tars" / "captions.jsonl"))
    index(str(folder / "tars"), str(folder / "indexed"), captions=captions, workers=1)
    source = open_source(str(folder / "indexed"))
    settings = PackSettings(size=16, shard_samples=16, holdout=8)
    t5, vae = TextEncoder.load(str(t5_folder), MAX_TOKENS), Autoencoder.load(str(vae_folder))
    assert pack(source, str(folder / "cached"), settings, t5, vae)
    assert pack(source, str(folder / "plain"), settings)
    return folder


@pytest.fixture(scope="module")
def recipe(packs: Path, vae_folder: Path, t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """PixArt on one of the packs; with `online=True` it has both encoders."""
    path = tmp_path_factory.mktemp("recipes") / "pixart.yaml"
    path.write_text(f"""\
name: pixart-tiny
model: {{family: pixart, input_size: 8, in_channels: 4, patch_size: 2, width: 32, depth: 2, head_dim: 16, text_dim: 16,
  max_text_tokens: {MAX_TOKENS}}}
parametrization: {{kind: mup, base_width: 16}}
objective: {{kind: ddpm}}
data: {{url: "{packs}/cached/train", validation_url: "{packs}/cached/validation", num_streams: 2, chunk_samples: 4,
  chunks_per_group: 2}}
optimizer: {{lr: 2^-7, warmup_steps: 2}}
training: {{num_images: 48, batch_size: 8, ema_rates: [0.9], log_every_steps: 1}}
checkpoints: {{every_images: 48}}
validation: {{every_images: 48, num_timesteps: 2, batch_size: 5}}
""")
    encoders = [f"encoders.text={t5_folder}", f"encoders.vae={vae_folder}", f"encoders.max_tokens={MAX_TOKENS}"]
    plain = [f"data.url={packs}/plain/train", f"data.validation_url={packs}/plain/validation"]
    return lambda *overrides, online=False: load(path, [*(encoders + plain if online else ()), *overrides])


@pytest.fixture(scope="module")
def cached(recipe: Callable[..., Recipe], train: Callable) -> Any:
    return train(recipe())


def test_pixart_trains_from_latents_and_t5_tokens(cached: Any) -> None:
    losses = cached.curve()["loss"]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert cached.validation().keys() == {"raw", "ema_0.9"}


def test_a_batch_is_that_of_cached_features(recipe: Callable[..., Recipe]) -> None:
    """Up to the rounding of float16; noise and draws to the last bit."""
    online = recipe(online=True)
    assert online.encoders
    encoders = OnlineEncoders(online.encoders, online, ALONE)
    streams = [Loader(each.data, each.seed, 8, 0, 1, stream_draws_noise(each)) for each in (recipe(), online)]
    for expected, raw, _ in zip(*(stream.iterate(3) for stream in streams), range(4), strict=False):
        assert raw.noise.shape == (8, 0)  # none of the pixels' size is drawn for nothing
        found = encoders.encode_training(raw, 3)
        _assert_same(found, expected)
    sets = [
        validation_batches(each.data, each.seed, 0, 1, 5, 2, stream_draws_noise(each)) for each in (recipe(), online)
    ]
    pairs = zip(*sets, strict=True)
    for (expected, _), (raw, _) in pairs:
        _assert_same(encoders.encode_validation(raw), expected)


def _assert_same(found: Any, expected: Any) -> None:
    for name in ("noise", "timestep_uniform", "drop_uniform", "epoch", "sample", "text_lengths", "labels"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.images, expected.images, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.text, expected.text, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("micro", ["null", "4"])
def test_the_curve_is_that_of_cached_features(
    micro: str, recipe: Callable[..., Recipe], train: Callable, cached: Any
) -> None:
    run = train(recipe(f"training.micro_batch_size={micro}", online=True))
    assert run.curve()["loss"] == pytest.approx(cached.curve()["loss"], rel=1e-3)
    assert run.validation() == pytest.approx(cached.validation(), rel=1e-3)


def test_a_sharded_text_encoder_gives_the_same_curve(
    recipe: Callable[..., Recipe], train: Callable, cached: Any
) -> None:
    run = train(recipe("engine.kind=fsdp", "engine.num_ranks=2", "encoders.sharded=true", online=True))
    assert run.curve()["loss"] == pytest.approx(cached.curve()["loss"], rel=1e-3)
    assert run.validation() == pytest.approx(cached.validation(), rel=1e-3)


@pytest.mark.slow
def test_a_sharded_text_encoder_gives_the_same_features(recipe: Callable[..., Recipe], run_ranks: Callable) -> None:
    """And a rank has half of its weights."""
    sharded = recipe("engine.kind=fsdp", "engine.num_ranks=2", "encoders.sharded=true", online=True)
    assert sharded.encoders
    unsharded = sharded.encoders.model_copy(update={"sharded": False})
    whole = OnlineEncoders(unsharded, sharded, ALONE)
    assert whole.text
    num_weights = sum(parameter.numel() for parameter in whole.text.module.parameters())
    for rank, (features, num_local) in enumerate(run_ranks("online.py", 2, recipe=sharded)):
        expected = whole.encode_training(next(Loader(sharded.data, sharded.seed, 8, rank, 2).iterate(0)), 4)
        torch.testing.assert_close(features, expected.text, rtol=1e-5, atol=1e-5)
        assert num_local < 0.6 * num_weights


def test_samples_are_drawn_with_the_encoders_of_the_run(
    recipe: Callable[..., Recipe], train: Callable, vae_folder: Path, tmp_path: Path
) -> None:
    short = ["training.num_images=8", "checkpoints.every_images=8", "validation=null"]
    run = train(recipe(*short, online=True))
    sample(run.folder, ["a crop"], tmp_path / "grid.png", num_steps=2, vae=str(vae_folder))
    assert (tmp_path / "grid.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("online", "overrides", "message"),
    [
        (
            True,
            ["encoders.vae=null"],
            r"model.input_size is 8, the data has 16; model.in_channels is 4, the data has 3",
        ),
        (True, ["encoders.text=null"], r"has captions and no features of them; state encoders.text"),
        (True, ["model.text_dim=32"], r"model.text_dim is 32, the data has 16"),
        (True, ["encoders.max_tokens=25"], r"captions of up to 25 tokens, the model takes model.max_text_tokens 24"),
        (True, ["model.input_size=16"], r"model.input_size is 16, the data has 8"),
        (True, ["data.url={packs}/cached/train"], r"has text features already|has latents already"),
        (False, ["data.url={packs}/indexed"], r"has pictures of their own sizes; state data.resolution"),
        (False, ["encoders.text={t5}"], r"has text features already \(of t5\); leave encoders.text out"),
        (False, ["encoders.vae={vae}"], r"has latents already \(of vae\); leave encoders.vae out"),
        (False, ["data.validation_url={packs}/plain/validation"], r"plain/validation has captions and no features"),
        (True, ["data.validation_url={packs}/cached/validation"], r"cached/validation has latents already"),
        (True, ["encoders.text=/absent"], r"text encoder '/absent': give 'minilm' or a folder"),
        (True, ["encoders.vae=/absent"], r"autoencoder '/absent': no such folder"),
    ],
)
def test_what_does_not_go_together(
    online: bool,
    overrides: list[str],
    message: str,
    recipe: Callable[..., Recipe],
    packs: Path,
    t5_folder: Path,
    vae_folder: Path,
    train: Callable,
    tmp_path: Path,
) -> None:
    filled = [override.format(packs=packs, t5=t5_folder, vae=vae_folder) for override in overrides]
    with pytest.raises(ValueError, match=message):
        train(recipe(*filled, online=online), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_raw_pictures_are_encoded_as_they_lie(recipe: Callable[..., Recipe], packs: Path, train: Callable) -> None:
    """Nothing packed at all: tars, their index, and both encoders."""
    raw = [f"data.url={packs}/indexed", "data.validation_url=null", "validation=null", "data.resolution=16"]
    run = train(recipe(*raw, online=True))
    assert len(run.curve()["loss"]) == 6


def test_recipes_that_make_no_sense(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="encoders.sharded needs an engine of several ranks"):
        recipe("encoders.sharded=true", online=True)
    with pytest.raises(RecipeError, match="state text, vae or both"):
        recipe("encoders.max_tokens=7")
    with pytest.raises(RecipeError, match="sharded is about the text encoder"):
        recipe("encoders.vae=x", "encoders.sharded=true")


def test_data_without_captions(recipe: Callable[..., Recipe], packs: Path, train: Callable, tmp_path: Path) -> None:
    shutil.copytree(packs / "tars", tmp_path / "tars")
    index(str(tmp_path / "tars"), str(tmp_path / "indexed"), workers=1)
    bare = [f"data.url={tmp_path}/indexed", "data.resolution=16"]
    with pytest.raises(ValueError, match=r"has no captions, which the model needs; join them"):
        train(recipe(*bare, online=True), tmp_path / "run")


def test_without_noise_nothing_else_changes(recipe: Callable[..., Recipe], packs: Path) -> None:
    data = recipe(online=True).data
    for workers in (0, 2):
        settings = data.model_copy(update={"num_workers": workers})
        plain, bare = (Loader(settings, 0, 8, 0, 1, with_noise) for with_noise in (True, False))
        for expected, found, _ in zip(plain.iterate(2), bare.iterate(2), range(3), strict=False):
            assert expected.noise.shape == (8, 3, 16, 16)
            assert found.noise.shape == (8, 0)
            for name in TENSORS:
                assert name == "noise" or torch.equal(getattr(found, name), getattr(expected, name)), name
            assert found.captions == expected.captions


def test_only_an_autoencoder_draws_noise_of_its_own(recipe: Callable[..., Recipe]) -> None:
    assert stream_draws_noise(recipe())
    assert stream_draws_noise(recipe("encoders.vae=null", online=True))
    assert not stream_draws_noise(recipe(online=True))
