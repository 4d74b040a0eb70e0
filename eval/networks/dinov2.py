"""DINOv2 of transformers, as dgm-eval uses it for FD-DINOv2 (Stein et al., arXiv 2306.04675)."""

from collections.abc import Sequence
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import Dinov2Model

from megadit.eval.resize import Pixels
from megadit.eval.weights import load_folder
from megadit.objectives.image_encoder import PIXEL_MEAN, PIXEL_STD

INPUT_SIZE = 224
POSITION_OFFSET = 0.1


class Dinov2Embedding:
    """The class token after the last norm, float32 [B, hidden_size]."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        model = load_folder(Dinov2Model, folder)
        positions = model.embeddings.position_embeddings
        patches = INPUT_SIZE // model.config.patch_size
        model.embeddings.position_embeddings = nn.Parameter(resize_positions(positions, patches), requires_grad=False)
        self._model = model.to(device)

    def prepare(self, pixels: Pixels) -> Tensor:
        """PIL's bicubic to 224 x 224, normalised by ImageNet. float32 [3, 224, 224]."""
        image = Image.fromarray(pixels).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC)
        image_3HW = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return (image_3HW - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._model(pixel_values=images).last_hidden_state[:, 0]


def resize_positions(positions_1ND: Tensor, patches: int) -> Tensor:
    """Position table [1, 1 + side^2, D] for `patches` x `patches`, as facebookresearch/dinov2 makes it.

    Theirs scales by (patches + 0.1) / side, a little more than transformers' by patches / side.
    """
    side = isqrt(positions_1ND.shape[1] - 1)
    if side == patches:
        return positions_1ND
    scale = (patches + POSITION_OFFSET) / side
    grid = positions_1ND[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions_1ND[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
