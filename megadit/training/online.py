"""Frozen encoders in the trainer: captions and pictures are encoded as they come, where the data has no features.

What the model sees is what it would see of cached features, up to the rounding of those: the encoders are the packer's,
and noise and latents are drawn by the keys of the sample, in the order in which the stream draws them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from megadit.data.autoencoder import Autoencoder
from megadit.data.batch import Batch, concatenate, pad_text
from megadit.data.text_encoder import TextEncoder
from megadit.randomness import Purpose, generator
from megadit.recipe import Encoders, Recipe
from megadit.training.ranks import world_size

Draws = Callable[[int], np.random.Generator]  # of the n-th sample of a batch, as they are before its noise is drawn


class OnlineEncoders:
    """The encoders of a recipe on this rank's device; either may be absent.

    They compute in bf16 where training does. With `encoders.sharded` the weights of the text encoder are spread over
    all ranks, which then must encode equally often. Raises TextEncoderError and AutoencoderError.
    """

    def __init__(self, encoders: Encoders, recipe: Recipe, device: torch.device) -> None:
        self._seed, self._device = recipe.seed, device
        self._num_strata = recipe.validation.num_timesteps if recipe.validation else 0
        dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
        self.text: TextEncoder | None = None
        self.autoencoder: Autoencoder | None = None
        if encoders.text is not None:
            # To be sharded, it is loaded into the memory of the host: a GPU need never have all of it.
            where = torch.device("cpu") if encoders.sharded else device
            self.text = TextEncoder.load(encoders.text, encoders.max_tokens, where, dtype)
            if encoders.sharded:
                _shard(self.text.module, device)
        if encoders.vae is not None:
            self.autoencoder = Autoencoder.load(encoders.vae, device, dtype)

    def encode_training(self, batch: Batch, size: int) -> Batch:
        """The batch on the device, with text features and latents, encoded `size` samples at a time."""

        def draws(row: int) -> np.random.Generator:
            found = generator(self._seed, Purpose.TRAINING_SAMPLE, int(batch.epoch[row]), int(batch.sample[row]))
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
            batch = replace(batch, images=self.autoencoder.to_model(mean + std * latent_noise), noise=noise)
        return batch

    def _normal(self, draws: Sequence[np.random.Generator], like_BCHW: Tensor) -> Tensor:
        """The next standard normal draws of each sample, float32 [B, C, H, W]."""
        shape = tuple(like_BCHW.shape[1:])
        values = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in draws])
        return torch.from_numpy(values).to(self._device)


def _shard(module: nn.Module, device: torch.device) -> None:
    """Spread the weights over all ranks, block by block: those of one block at a time are gathered."""
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    lists = [found for found in module.modules() if isinstance(found, nn.ModuleList)]
    for block in max(lists, key=_num_parameters):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)  # by default what is in no block would stay gathered


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
