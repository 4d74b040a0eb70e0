"""One rank encodes captions by a text encoder of which it has read its own rows alone."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megadit.batch import TextFeatures
from megadit.distributed import process_group
from megadit.training.sharded_encoder import load_sharded


def main(folder: str, captions: Sequence[str], dtype: torch.dtype) -> tuple[list[TextFeatures], list[Tensor]]:
    """The features, and this rank's part of the weights."""
    with process_group(needed=True) as topology:
        encoder = load_sharded(topology, folder, 120, torch.device("cpu"), dtype)
        features = encoder.encode(captions)
        weights = list(encoder.module.parameters())
        return features, [weight.to_local().clone() for weight in weights if isinstance(weight, DTensor)]
