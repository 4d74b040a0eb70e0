"""Frozen encoders in the trainer: captions and pictures are encoded as they come, where the data has no features.

What the model sees is what it would see of cached features, up to the rounding of those: the encoders are the packer's,
and noise and latents are drawn by the keys of the sample, in the order in which the stream draws them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megadit.batch import Batch, concatenate, pad_text
from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.encoders.text_encoder import TextEncoder
from megadit.distributed import Topology
from megadit.randomness import Purpose, generator, seed_of_stage
from megadit.recipe import Encoders, Recipe
from megadit.training.sharded_encoder import load_sharded

Draws = Callable[[int], np.random.Generator]  # of the n-th sample of a batch, as they are before its noise is drawn


def stream_draws_noise(recipe: Recipe) -> bool:
    """Whether batches come with their noise; where pictures become latents here, that of the latents is drawn here."""
    return recipe.encoders is None or recipe.encoders.vae is None


def encoder_dtype(recipe: Recipe) -> torch.dtype:
    """In which frozen encoders compute: as training does. (TF32 is a switch of the process.)"""
    return torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32


class OnlineEncoders:
    """The encoders of a recipe on this rank's device; either may be absent.

    They compute in bf16 where training does. With `encoders.sharded` the weights of the text encoder are spread over
    all ranks, which then must encode equally often. Raises TextEncoderError and AutoencoderError.
    """

    def __init__(self, encoders: Encoders, recipe: Recipe, topology: Topology, stage: int = 0) -> None:
        self._seed, self._device = recipe.seed, topology.device
        self._training_seed = seed_of_stage(recipe.seed, stage)
        self._keeps_pixels = recipe.objective.image_encoder is not None
        self._num_strata = recipe.validation.num_timesteps if recipe.validation else 0
        dtype = encoder_dtype(recipe)
        self.text: TextEncoder | None = None
        self.autoencoder: Autoencoder | None = None
        if encoders.text is not None:
            load = partial(load_sharded, topology) if encoders.sharded else TextEncoder.load
            self.text = load(encoders.text, encoders.max_tokens, self._device, dtype)
        if encoders.vae is not None:
            self.autoencoder = Autoencoder.load(encoders.vae, self._device, dtype)

    def encode_training(self, batch: Batch, size: int) -> Batch:
        """The batch on the device, with text features and latents, encoded `size` samples at a time."""

        def draws(row: int) -> np.random.Generator:
            epoch, sample = int(batch.epoch[row]), int(batch.sample[row])
            found = generator(self._training_seed, Purpose.TRAINING_SAMPLE, epoch, sample)
            found.random(2, dtype=np.float32)  # timestep and condition dropout
            return found

        return self._encode(batch, size, draws)

    def encode_validation(self, batch: Batch) -> Batch:
        """The same for a batch of the validation set."""
        stratum_B = (batch.timestep_uniform * self._num_strata).long()

        def draws(row: int) -> np.random.Generator:
            return generator(self._seed, Purpose.VALIDATION_SAMPLE, int(batch.sample[row]), int(stratum_B[row]))

        return self._encode(batch, len(batch), draws)

    def _encode(self, batch: Batch, size: int, draws: Draws) -> Batch:
        encoded = [
            self._encode_part(part, [draws(number * size + row) for row in range(len(part))])
            for number, part in enumerate(batch.split(size))
        ]
        return concatenate(encoded)

    def _encode_part(self, batch: Batch, draws: Sequence[np.random.Generator]) -> Batch:
        batch = batch.to(self._device)
        if self.text is not None:
            text, lengths, pooled = pad_text(self.text.encode(batch.captions))
            batch = replace(batch, text=text, text_lengths=lengths.to(self._device), pooled=pooled)
        if self.autoencoder is not None:
            mean, std = self.autoencoder.encode(batch.images)
            noise, latent_noise = self._normal(draws, mean), self._normal(draws, mean)
            if self._keeps_pixels:
                batch = replace(batch, pixels=batch.images)
            batch = replace(batch, images=self.autoencoder.to_model(mean + std * latent_noise), noise=noise)
        return batch

    def _normal(self, draws: Sequence[np.random.Generator], like_BCHW: Tensor) -> Tensor:
        """The next standard normal draws of each sample, float32 [B, C, H, W]."""
        shape = tuple(like_BCHW.shape[1:])
        values = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in draws])
        return torch.from_numpy(values).to(self._device)
