"""The autoencoder of diffusers, read from a folder: right pictures, and clear errors for a wrong folder."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from megadit.recipe import DiTModel
from megadit.sampling.autoencoder import Autoencoder

MODEL = DiTModel(input_size=4, in_channels=4, width=32, depth=1, head_dim=16)


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return AutoencoderKL(**blocks, **sizes, scaling_factor=0.18215, shift_factor=0.1).eval()


def test_latents_are_decoded_in_the_models_units(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mode()
        expected = vae.decode(z).sample
    decoded = Autoencoder.load(str(tmp_path), MODEL).decode((z - 0.1) * 0.18215)
    assert decoded.shape == images.shape
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ValueError, match=r"autoencoder '/no/such/folder': no such folder"):
        Autoencoder.load("/no/such/folder", MODEL)


def test_a_folder_without_an_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diffusers cannot load it") as caught:
        Autoencoder.load(str(tmp_path), MODEL)
    assert str(tmp_path) in str(caught.value)


def test_other_latents_are_refused(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    other = MODEL.model_copy(update={"in_channels": 16})
    with pytest.raises(ValueError, match=r"latents of 4 channels, model.in_channels is 16"):
        Autoencoder.load(str(tmp_path), other)
