"""One rank encodes its part of the first batch by a text encoder that is spread over all ranks."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megadit.data.loading.loader import Loader
from megadit.recipe import Recipe
from megadit.training.online import OnlineEncoders
from megadit.training.ranks import process_group, rank, world_size


def main(recipe: Recipe) -> tuple[Tensor, int]:
    """The text features, and how many weights of the encoder are here."""
    with process_group(needed=True):
        assert recipe.encoders
        encoders = OnlineEncoders(recipe.encoders, recipe, torch.device("cpu"))
        stream = Loader(recipe.data, recipe.seed, recipe.training.batch_size, rank(), world_size())
        batch = encoders.encode_training(next(stream.iterate(0)), 4)
        assert encoders.text
        weights = list(encoders.text.module.parameters())
        assert all(isinstance(weight, DTensor) for weight in weights)
        return batch.text, sum(weight.to_local().numel() for weight in weights if isinstance(weight, DTensor))
