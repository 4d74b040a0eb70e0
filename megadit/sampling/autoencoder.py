"""Latents to pictures, by a pretrained autoencoder read from this machine."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from megadit.recipe import ModelConfig


class Autoencoder:
    """A frozen AutoencoderKL of diffusers. Latents are in the model's units: (z - shift_factor) * scaling_factor."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = vae.eval().requires_grad_(False)

    @staticmethod
    def load(folder: str, model: ModelConfig) -> "Autoencoder":
        """The autoencoder in a local folder (of diffusers), fp32.

        Raises ValueError for a folder that is missing or has none, and for one whose latents are not the model's.
        """
        if not Path(folder).is_dir():
            raise ValueError(f"autoencoder {folder!r}: no such folder; give one with an AutoencoderKL of diffusers")
        try:
            vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"autoencoder {folder!r}: diffusers cannot load it: {reason}") from error
        channels = vae.config.latent_channels
        if channels != model.in_channels:
            raise ValueError(
                f"autoencoder {folder!r} has latents of {channels} channels, model.in_channels is {model.in_channels}"
            )
        return Autoencoder(vae)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures [B, 3, 8 H, 8 W] (for the usual three halvings), about in [-1, 1]; one at a time, to save memory."""
        config = self._vae.config
        z = latents_BCHW / config.scaling_factor + (config.shift_factor or 0.0)
        return torch.cat([self._vae.decode(part).sample for part in z.split(1)])
