"""REPA on latents: features that packs carry, and those that the trainer computes from pictures beside latents."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megadit.batch import Batch
from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.format.manifest import Manifest
from megadit.data.format.members import DataSet
from megadit.data.inspect import stats, verify
from megadit.data.loading.loader import Loader, validation_batches
from megadit.data.packing.pack import pack
from megadit.data.packing.settings import PackError, PackSettings
from megadit.data.packing.sources import open_source
from megadit.data.preview import preview
from megadit.distributed import ALONE
from megadit.objectives.image_encoder import ImageEncoder
from megadit.recipe import Recipe
from megadit.training.data_fits import check_data_fits
from megadit.training.online import OnlineEncoders

GRID = 4  # tokens a side: 16 pixels, latents of 8, patches of 2
SETTINGS = PackSettings(size=16, holdout=8, where=("subgroup=animal-bird", "skin_tone=false"), feature_grid=GRID)
LATENTS = ("model.in_channels=4", "model.input_size=8", "model.patch_size=2", "objective.repa={weight: 0.25}")
LATENTS += ("model.repa={block: 1, feature_dim: 24}", "data.chunk_samples=2", "data.chunks_per_group=2")


@pytest.fixture(scope="module")
def packs(
    encoder: TextEncoder, vae_folder: Path, repa_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Packs of latents with features, unless told otherwise."""
    image_encoder, vae = ImageEncoder.load(str(repa_folder)), Autoencoder.load(str(vae_folder))

    def make(with_features: bool = True, with_latents: bool = True, num_ranks: int = 1, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("features")
        settings = replace(SETTINGS, feature_grid=GRID if with_features else None, **changes)
        encoders = (encoder, vae if with_latents else None, image_encoder if with_features else None)
        for rank in range(num_ranks):
            pack(open_source("emoji"), str(folder), settings, *encoders, rank=rank, world_size=num_ranks)
        return folder

    return make


@pytest.fixture(scope="module")
def stored(packs: Callable[..., Path]) -> Path:
    """With features in bfloat16 and the pictures."""
    return packs()


@pytest.fixture(scope="module")
def on(tiny_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """The tiny recipe with REPA on latents of a pack."""

    def make(folder: Path, *overrides: str) -> Recipe:
        urls = (f"data.url={folder}/train", f"data.validation_url={folder}/validation")
        return tiny_recipe(*LATENTS, *urls, *overrides)

    return make


def batch_of(recipe: Recipe) -> Batch:
    return next(Loader(recipe.data, 0, 8, 0, 1, with_features=True).iterate(0))


def encoded(batch: Batch, folder: Path) -> Tensor:
    """What the encoder makes of the pictures of a batch with pixels."""
    return ImageEncoder.load(str(folder)).encode(batch.pixels, GRID)


def test_packs_have_what_the_encoder_gives(
    packs: Callable[..., Path], stored: Path, on: Callable[..., Recipe], repa_folder: Path
) -> None:
    """To the nearest bfloat16, or to half of the token's scale."""
    pictures = batch_of(on(packs(with_features=False), f"objective.repa.encoder={repa_folder}"))
    assert pictures.features.shape == (8, 0, 0) and pictures.pixels.shape == (8, 3, 16, 16)
    expected = encoded(pictures, repa_folder)
    rounded, whole = batch_of(on(stored)), batch_of(on(packs(feature_dtype="int8", keep_pictures=False)))
    for batch in (rounded, whole):
        assert torch.equal(batch.sample, pictures.sample)
        assert batch.features.shape == (8, GRID**2, 24) and batch.pixels.shape == (8, 0)
    # (One picture at a time or eight, products are summed in another order.)
    torch.testing.assert_close(rounded.features, expected.bfloat16().float(), rtol=2**-7, atol=1e-5)
    assert (rounded.features == expected.bfloat16().float()).float().mean() > 0.99
    scale = expected.abs().amax(dim=2, keepdim=True) / 127
    assert ((whole.features - expected).abs() <= 0.51 * scale * (1 + 2**-10)).all()


def test_nobody_reads_features_who_does_not_need_them(stored: Path, on: Callable[..., Recipe]) -> None:
    recipe = on(stored)
    plain = next(Loader(recipe.data, 0, 8, 0, 1).iterate(0))
    assert plain.features.shape == (8, 0, 0)
    assert torch.equal(plain.images, batch_of(recipe).images)
    for batch, _ in validation_batches(recipe.data, 0, 0, 1, 4, 2, with_features=True):
        assert batch.features.shape[1:] == (GRID**2, 24)


def test_a_pack_with_features_is_verified_shown_and_split(
    stored: Path, on: Callable[..., Recipe], tmp_path: Path
) -> None:
    manifest = Manifest.load(f"{stored}/train")
    assert {"features.npy", "latent.npy"} <= set(manifest.members)
    assert manifest.features and (manifest.features.grid, manifest.features.dim) == (GRID, 24)
    assert verify(f"{stored}/train") == []
    assert stats(f"{stored}/train").member_bytes["features.npy"] >= manifest.num_samples * 2 * GRID**2 * 24
    assert preview(f"{stored}/train", tmp_path / "sheet.png", 4) == 4
    first, second = batch_of(on(stored)).split(4)
    assert len(first.features) == len(second.features) == 4


def test_ranks_that_share_a_pack_make_the_same(packs: Callable[..., Path]) -> None:
    alone, shared = (packs(num_ranks=ranks, shard_samples=8, feature_dtype="int8") for ranks in (1, 2))
    assert len(list(alone.glob("train/*.tar"))) > 1
    for path in alone.rglob("*.tar"):
        assert path.read_bytes() == (shared / path.relative_to(alone)).read_bytes()
    assert Manifest.load(f"{alone}/train") == Manifest.load(f"{shared}/train")


def test_features_that_are_corrupt_are_replaced_with_their_sample(
    stored: Path, on: Callable[..., Recipe], tmp_path: Path
) -> None:
    """One bit of them is another: picture, caption and features are those of a neighbour."""
    copy = Path(shutil.copytree(stored, tmp_path / "copy"))
    recipe, sound = on(copy, "data.max_corrupt_share=0.5"), batch_of(on(stored))
    place = DataSet(f"{copy}/train").index.places["features.npy"][int(sound.sample[0])]
    (shard,) = (copy / "train").glob("*.tar")
    data = bytearray(shard.read_bytes())
    data[int(place["offset"]) + int(place["size"]) - 1] ^= 1
    shard.write_bytes(data)
    assert "CRC-32 differs" in verify(f"{copy}/train")[0]
    found = batch_of(recipe)
    assert found.replaced.tolist() == [1] + [0] * 7
    assert not torch.equal(found.features[0], sound.features[0]) and not torch.equal(found.images[0], sound.images[0])
    assert torch.equal(found.features[1:], sound.features[1:]) and torch.equal(found.noise, sound.noise)


@pytest.fixture(scope="module")
def curves(
    packs: Callable[..., Path], stored: Path, on: Callable[..., Recipe], repa_folder: Path, run_ranks: Callable
) -> dict[str, list[dict[str, Any]]]:
    """What ranks found, from stored features and from those computed as pictures come."""
    online = on(packs(with_features=False), f"objective.repa.encoder={repa_folder}")
    sharded = on(stored, "engine.kind=fsdp", "engine.num_ranks=2")
    jobs = {"stored": (on(stored), 1), "online": (online, 1), "fsdp": (sharded, 2)}
    return {
        name: [found for (found,) in run_ranks("engine_steps.py", ranks, jobs=[(recipe, None)], num_steps=3)]
        for name, (recipe, ranks) in jobs.items()
    }


@pytest.fixture(scope="module")
def pictures(packs: Callable[..., Path]) -> Path:
    """Pictures alone, to be encoded in the trainer."""
    return packs(with_features=False, with_latents=False)


@pytest.fixture(scope="module")
def runs(
    packs: Callable[..., Path],
    stored: Path,
    pictures: Path,
    on: Callable[..., Recipe],
    train: Callable,
    repa_folder: Path,
    vae_folder: Path,
) -> dict[str, Any]:
    """Three steps of the trainer in micro-batches and a validation, for each place that features come from."""
    short = (
        "training.num_images=24",
        "training.batch_size=8",
        "training.micro_batch_size=4",
        "validation.batch_size=5",
    )
    encoder = f"objective.repa.encoder={repa_folder}"
    recipes = {
        "stored": on(stored, *short),
        "pixels beside latents": on(packs(with_features=False), encoder, *short),
        "pictures": on(pictures, encoder, f"encoders.vae={vae_folder}", *short),
    }
    return {name: train(recipe) for name, recipe in recipes.items()}


@pytest.mark.parametrize("name", ["pixels beside latents", "pictures"])
def test_the_trainer_has_one_curve_wherever_features_come_from(runs: dict[str, Any], name: str) -> None:
    """But for the rounding of features to bfloat16, and of latents to float16: metric by metric."""
    for kind, metrics in (("train", ("velocity", "alignment")), ("validation", ("loss", "alignment"))):
        ours, theirs = runs[name].lines(kind), runs["stored"].lines(kind)
        assert len(ours) == len(theirs) >= 2
        for metric in metrics:
            expected = [line[metric] for line in theirs]
            assert [line[metric] for line in ours] == pytest.approx(expected, abs=2e-3)
            assert max(map(abs, expected)) > 5e-3  # there is something to compare


def test_pixels_are_kept_where_features_are_computed_alone(
    packs: Callable[..., Path], pictures: Path, on: Callable[..., Recipe], repa_folder: Path, vae_folder: Path
) -> None:
    """Of pictures that become latents in the trainer."""
    vae = f"encoders.vae={vae_folder}"
    online = on(pictures, vae, f"objective.repa.encoder={repa_folder}")
    ready = on(packs(with_latents=False), vae)
    for recipe, shape in ((online, (8, 3, 16, 16)), (ready, (8, 0))):
        assert recipe.encoders is not None
        check_data_fits(recipe, Manifest.load(recipe.data.url))
        seen = next(Loader(recipe.data, 0, 8, 0, 1, with_noise=False, with_features=True).iterate(0))
        batch = OnlineEncoders(recipe.encoders, recipe, ALONE).encode_training(seen, 4)
        assert batch.images.shape == (8, 4, 8, 8) and batch.pixels.shape == shape
        assert bool(batch.features.shape[1]) == (not batch.pixels.shape[1])


def losses_of(ranks: list[dict[str, Any]]) -> Tensor:
    return torch.stack([torch.cat(parts) for parts in zip(*(rank["losses"] for rank in ranks), strict=True)])


def test_where_features_come_from_changes_rounding_alone(curves: dict[str, Any]) -> None:
    stored, online = losses_of(curves["stored"]), losses_of(curves["online"])
    assert not torch.equal(stored, online)  # bfloat16 is not float32
    torch.testing.assert_close(online, stored, rtol=2e-3, atol=2e-3)


def test_ranks_give_the_curve_of_a_single_process(curves: dict[str, Any]) -> None:
    torch.testing.assert_close(losses_of(curves["fsdp"]), losses_of(curves["stored"]), rtol=1e-4, atol=1e-5)


def test_what_the_data_lacks_is_said(
    packs: Callable[..., Path], stored: Path, on: Callable[..., Recipe], repa_folder: Path
) -> None:
    def check(folder: Path, *overrides: str) -> None:
        check_data_fits(on(folder, *overrides), Manifest.load(f"{folder}/train"))

    check(stored)
    encoder, absent = (f"objective.repa.encoder={folder}" for folder in (repa_folder, "/absent"))
    without, alone = packs(with_features=False), packs(with_features=False, keep_pictures=False)
    for call, message in (
        (partial(check, without), "has no features of its pictures: state objective.repa.encoder"),
        (partial(check, alone), "has latents alone, and objective.repa needs features of the pictures: pack it with"),
        (partial(check, stored, "objective.repa.encoder=x"), "already (of dinov2); leave objective.repa.encoder out"),
        (partial(check, stored, "model.repa.feature_dim=768"), "has 24 image features, model.repa.feature_dim is 768"),
        (partial(check, without, absent), "image encoder /absent: no such folder"),
        (
            partial(check, without, encoder, "model.repa.feature_dim=768"),
            "has 24 features, model.repa.feature_dim is 768",
        ),
        (partial(check, stored, "model.patch_size=4"), "of 4x4 patches, the model has 2x2 tokens; pack it with"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            call()


def test_what_cannot_be_packed_is_said(repa_folder: Path, tmp_path: Path) -> None:
    image_encoder = ImageEncoder.load(str(repa_folder))
    for settings, given, message in (
        (SETTINGS, None, "feature_grid 4 is of no use without an image encoder"),
        (replace(SETTINGS, size=24, feature_grid=None), image_encoder, "size 24 is no multiple of 16"),
        (replace(SETTINGS, aspect_buckets=True), image_encoder, "features of pictures are of squares only"),
    ):
        with pytest.raises(PackError, match=message):
            pack(open_source("emoji"), str(tmp_path), settings, None, None, given)


def test_old_packs_keep_their_fingerprints(packed: Path) -> None:
    """A manifest that was written before there were features is the same."""
    manifest = Manifest.load(f"{packed}/train")
    assert manifest.features is None
    assert "features" not in manifest.dump().decode()
    assert np.array_equal(manifest.sealed().fingerprint, manifest.fingerprint)
