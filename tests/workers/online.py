"""One rank encodes its part of the first batch by a text encoder that is spread over all ranks."""

from torch import Tensor
from torch.distributed.tensor import DTensor

from megadit.data.loading.loader import Loader
from megadit.distributed import process_group
from megadit.recipe import Recipe
from megadit.training.online import OnlineEncoders


def main(recipe: Recipe) -> tuple[Tensor, int]:
    """The text features, and how many weights of the encoder are here."""
    with process_group(needed=True) as topology:
        assert recipe.encoders
        encoders = OnlineEncoders(recipe.encoders, recipe, topology)
        stream = Loader(recipe.data, recipe.seed, recipe.training.batch_size, topology.data.rank, topology.data.size)
        batch = encoders.encode_training(next(stream.iterate(0)), 4)
        assert encoders.text
        weights = list(encoders.text.module.parameters())
        assert all(isinstance(weight, DTensor) for weight in weights)
        return batch.text, sum(weight.to_local().numel() for weight in weights if isinstance(weight, DTensor))
