"""Pictures to latents and back, by a frozen pretrained autoencoder read from this machine."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from megadit.checksums import sha256_of

BATCH_SIZE = 16  # pictures encoded at once


class AutoencoderError(ValueError):
    """An autoencoder that is not on this machine or cannot be read."""


class Autoencoder:
    """A frozen AutoencoderKL of diffusers.

    `channels` of a latent, `downsampling` pixels a side for one of its own. Models see (latent - shift_factor) *
    scaling_factor, the units of this class but for `encode`, whose results are those of the network.
    """

    def __init__(self, vae: AutoencoderKL, name: str, sha256: str) -> None:
        self._vae = vae.eval().requires_grad_(False)
        self.name, self.weights_sha256 = name, sha256
        self.channels, self.downsampling = _latent_shape(vae.config)
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0.0)

    @staticmethod
    def load(folder: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> "Autoencoder":
        """The autoencoder in a local folder (of diffusers). Raises AutoencoderError where it is missing or broken."""
        with _loading(folder) as path:
            vae = AutoencoderKL.from_pretrained(
                path,
                local_files_only=True,
                torch_dtype=dtype,
                low_cpu_mem_usage=False,  # True wants accelerate
            )
        weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        return Autoencoder(vae.to(device), path.resolve().name, sha256_of(*weights))

    @staticmethod
    def latent_shape(folder: str) -> tuple[int, int]:
        """`channels` and `downsampling` of an autoencoder, from its configuration alone. Raises AutoencoderError."""
        with _loading(folder) as path:
            return _latent_shape(AutoencoderKL.load_config(path, local_files_only=True))

    @property
    def module(self) -> AutoencoderKL:
        """The network, for those who spread it over ranks."""
        return self._vae

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents of pictures in [-1, 1]: float32 [B, channels, H / downsampling, ...].

        A latent is mean + std * a standard normal draw. (`latent_dist.sample` would draw from the global generator.)
        """
        images_BCHW = images_BCHW.to(self._vae.device, self._vae.dtype)
        latents = [self._vae.encode(part).latent_dist for part in images_BCHW.split(BATCH_SIZE)]
        return (
            torch.cat([latent.mean for latent in latents]).float(),
            torch.cat([latent.std for latent in latents]).float(),
        )

    def to_model(self, latents: Tensor) -> Tensor:
        """Latents of the network in the units of a model."""
        return (latents - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures [B, 3, downsampling H, downsampling W], about in [-1, 1]; one at a time, to save memory."""
        z = latents_BCHW / self.scaling_factor + self.shift_factor
        return torch.cat([self._vae.decode(part).sample for part in z.split(1)])


def _latent_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    return int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)


@contextlib.contextmanager
def _loading(folder: str) -> Iterator[Path]:
    path = Path(folder)
    if not path.is_dir():
        raise AutoencoderError(f"autoencoder {folder!r}: no such folder; give one with an AutoencoderKL of diffusers")
    try:
        yield path
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise AutoencoderError(f"autoencoder {folder!r}: diffusers cannot load it: {reason}") from error
