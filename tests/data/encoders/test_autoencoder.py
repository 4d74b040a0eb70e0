"""The autoencoder of diffusers, read from a folder: right pictures, and clear errors for a wrong folder."""

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from megadit.data.encoders.autoencoder import BATCH_SIZE, Autoencoder, AutoencoderError
from megadit.recipe import load
from megadit.sampling.generate import load_decoder


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
    autoencoder = Autoencoder.load(str(tmp_path))
    torch.testing.assert_close(autoencoder.to_model(z), (z - 0.1) * 0.18215)
    decoded = autoencoder.decode(autoencoder.to_model(z))
    assert decoded.shape == images.shape
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


def test_moments_are_those_of_diffusers(vae: AutoencoderKL, tmp_path: Path) -> None:
    """mean + std * draw is what its own `sample` gives for the same draw; more pictures than are encoded at once."""
    vae.save_pretrained(tmp_path)
    images = torch.randn(BATCH_SIZE + 3, 3, 8, 16)
    autoencoder = Autoencoder.load(str(tmp_path))
    mean, std = autoencoder.encode(images)
    assert mean.shape == std.shape == (len(images), autoencoder.channels, 4, 8)
    assert (autoencoder.channels, autoencoder.downsampling) == Autoencoder.latent_shape(str(tmp_path)) == (4, 2)
    with torch.no_grad():
        sampled = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
    draw = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mean + std * draw, sampled, rtol=1e-4, atol=1e-5)
    assert not mean.requires_grad


def test_bfloat16(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 8, 8)
    mean, _ = Autoencoder.load(str(tmp_path)).encode(images)
    coarse, std = Autoencoder.load(str(tmp_path), dtype=torch.bfloat16).encode(images)
    assert coarse.dtype == std.dtype == torch.float32
    assert 0 < (coarse - mean).abs().max() < 0.1 * mean.abs().max()


def test_the_state_says_which_weights_they_are(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "one")
    vae.encoder.conv_in.bias.data += 1
    vae.save_pretrained(tmp_path / "two")
    one, two = (Autoencoder.load(str(tmp_path / name)) for name in ("one", "two"))
    assert one.name == "one"
    weights = (tmp_path / "one" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert one.weights_sha256 == hashlib.sha256(weights).hexdigest() != two.weights_sha256


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(AutoencoderError, match=r"autoencoder '/no/such/folder': no such folder"):
        Autoencoder.load("/no/such/folder")


def test_a_folder_without_an_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AutoencoderError, match="diffusers cannot load it") as caught:
        Autoencoder.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_latents_of_another_model_are_refused(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"latents of 4 channels, model.in_channels is 3"):
        load_decoder(str(tmp_path), load("quickstart"))
