"""The alignment loss of REPA (arXiv 2410.06940, equation 8): image tokens should foretell features of DINOv2.

The encoder sees the clean picture, the network the noisy one. One encoder patch belongs to one image token. Features
come with the batch where the data has them; otherwise they are computed here from the picture's pixels.
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megadit.batch import Batch
from megadit.models import ModelConfig
from megadit.objectives.image_encoder import ImageEncoder

LEAST_LENGTH = 1.0


class Alignment:
    """The loss, and where `encoder` is a folder the frozen DINOv2 in it, which computes in `dtype`.

    Raises ValueError where that is not one of the head's feature dimension.
    """

    def __init__(self, encoder: str | None, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._grid = isqrt(model.num_patches)
        self._encoder = None if encoder is None else ImageEncoder.load(encoder, device, dtype)
        if self._encoder is not None and self._encoder.dim != model.feature_dim:
            raise ValueError(
                f"image encoder {encoder}: it has {self._encoder.dim} features, "
                f"model.repa.feature_dim is {model.feature_dim}"
            )

    def losses(self, predicted_BTF: Tensor, batch: Batch) -> Tensor:
        """Minus the mean cosine between predicted and true features of each picture, fp32 [B].

        A prediction shorter than LEAST_LENGTH counts as if it had that length: the gradient of a cosine has no bound at
        zero, and Adam's second moment would remember it for long.
        """
        predicted_BTF = predicted_BTF.float()
        length_BT1 = torch.linalg.vector_norm(predicted_BTF, dim=2, keepdim=True)
        predicted_BTF = predicted_BTF / length_BT1.clamp(min=LEAST_LENGTH)
        return -(predicted_BTF * normalize(self.features(batch), dim=2)).sum(2).mean(1)

    def features(self, batch: Batch) -> Tensor:
        """The true features, float32 [B, T, F] in the order of the tokens."""
        if batch.features.shape[1]:
            return batch.features
        assert self._encoder is not None, "data without features is refused where the recipe names no encoder"
        pixels = batch.pixels if batch.pixels.shape[1] else batch.images
        return self._encoder.encode(pixels, self._grid)
