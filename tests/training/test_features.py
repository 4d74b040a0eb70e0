"""REPA on latents: features that packs carry, and those that the trainer computes from pictures beside latents."""

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
from megadit.data.inspect import verify
from megadit.data.loading.loader import Loader, validation_batches
from megadit.data.packing.pack import pack
from megadit.data.packing.settings import PackError, PackSettings
from megadit.data.packing.sources import open_source
from megadit.objectives.image_encoder import ImageEncoder
from megadit.recipe import Recipe
from megadit.training.data_fits import check_data_fits

GRID = 4  # tokens a side: 16 pixels, latents of 8, patches of 2
SETTINGS = PackSettings(size=16, holdout=8, where=("subgroup=animal-bird", "skin_tone=false"), feature_grid=GRID)
LATENTS = ("model.in_channels=4", "model.input_size=8", "model.patch_size=2", "objective.repa={weight: 0.25}")
LATENTS += ("model.repa={block: 1, feature_dim: 24}", "data.chunk_samples=2", "data.chunks_per_group=2")


@pytest.fixture(scope="module")
def packs(
    encoder: TextEncoder, vae_folder: Path, repa_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Packs of latents, with features unless told otherwise."""
    image_encoder, vae = ImageEncoder.load(str(repa_folder)), Autoencoder.load(str(vae_folder))

    def make(with_features: bool = True, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("features")
        settings = replace(SETTINGS, feature_grid=GRID if with_features else None, **changes)
        pack(open_source("emoji"), str(folder), settings, encoder, vae, image_encoder if with_features else None)
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


def test_a_pack_with_features_is_verified_and_split(stored: Path, on: Callable[..., Recipe]) -> None:
    manifest = Manifest.load(f"{stored}/train")
    assert {"features.npy", "latent.npy"} <= set(manifest.members)
    assert manifest.features and (manifest.features.grid, manifest.features.dim) == (GRID, 24)
    assert verify(f"{stored}/train") == []
    first, second = batch_of(on(stored)).split(4)
    assert len(first.features) == len(second.features) == 4


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


def losses_of(ranks: list[dict[str, Any]]) -> Tensor:
    return torch.stack([torch.cat(parts) for parts in zip(*(rank["losses"] for rank in ranks), strict=True)])


def test_where_features_come_from_changes_rounding_alone(curves: dict[str, Any]) -> None:
    stored, online = losses_of(curves["stored"]), losses_of(curves["online"])
    assert not torch.equal(stored, online)  # bfloat16 is not float32
    torch.testing.assert_close(online, stored, rtol=2e-3, atol=2e-3)


def test_ranks_give_the_curve_of_a_single_process(curves: dict[str, Any]) -> None:
    torch.testing.assert_close(losses_of(curves["fsdp"]), losses_of(curves["stored"]), rtol=1e-4, atol=1e-5)


def test_what_the_data_lacks_is_said(packs: Callable[..., Path], stored: Path, on: Callable[..., Recipe]) -> None:
    def check(folder: Path, *overrides: str) -> None:
        check_data_fits(on(folder, *overrides), Manifest.load(f"{folder}/train"))

    check(stored)
    without, alone = packs(with_features=False), packs(with_features=False, keep_pictures=False)
    for call, message in (
        (partial(check, without), "has no features of its pictures: state objective.repa.encoder"),
        (partial(check, alone), "has latents alone, and objective.repa needs features of the pictures: pack it with"),
        (partial(check, stored, "objective.repa.encoder=x"), "already (of dinov2); leave objective.repa.encoder out"),
        (partial(check, stored, "model.repa.feature_dim=768"), "has 24 image features, model.repa.feature_dim is 768"),
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
