"""How pictures become what the FID Inception takes: the resize is the protocol, so each variant has a name.

A resizer takes uint8 [H, W, 3] and gives float32 [3, 299, 299] in about [-1, 1].

name              as in                                 how
adm               ADM's evaluator, TTUR, torch-fidelity  bilinear of TensorFlow 1: no half-pixel, no antialiasing
clean             clean-fid (arXiv 2104.11222)           PIL's bicubic of each channel in float32, not rounded
pytorch-fid       pytorch-fid                            torch's bilinear without antialiasing
torch-antialias   torchmetrics' default                  torch's bilinear with antialiasing
mup               GigaGAN, the muP paper's tools/fid.py  center crop, PIL's Lanczos to 256, then clean
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

INCEPTION_SIZE = 299
MUP_SIZE = 256

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Resizer = Callable[[Pixels], Tensor]


def adm(pixels: Pixels) -> Tensor:
    return (tf1_bilinear(_channels_first(pixels), INCEPTION_SIZE) - 128) / 128


def clean(pixels: Pixels) -> Tensor:
    channels = [
        np.asarray(
            Image.fromarray(pixels[:, :, channel].astype(np.float32)).resize(
                (INCEPTION_SIZE, INCEPTION_SIZE), Image.Resampling.BICUBIC
            )
        )
        for channel in range(3)
    ]
    return (torch.from_numpy(np.stack(channels).clip(0, 255)) - 128) / 128


def pytorch_fid(pixels: Pixels) -> Tensor:
    image_3HW = _channels_first(pixels) / 255
    return 2 * interpolate(image_3HW[None], size=(INCEPTION_SIZE, INCEPTION_SIZE), mode="bilinear")[0] - 1


def torch_antialias(pixels: Pixels) -> Tensor:
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    return (interpolate(_channels_first(pixels)[None], size=size, mode="bilinear", antialias=True)[0] - 128) / 128


def mup(pixels: Pixels) -> Tensor:
    image = center_crop(Image.fromarray(pixels), min(pixels.shape[:2]))
    return clean(np.asarray(image.resize((MUP_SIZE, MUP_SIZE), Image.Resampling.LANCZOS)))


RESIZERS: dict[str, Resizer] = {
    "adm": adm,
    "clean": clean,
    "pytorch-fid": pytorch_fid,
    "torch-antialias": torch_antialias,
    "mup": mup,
}


def tf1_bilinear(image_CHW: Tensor, size: int) -> Tensor:
    """tf.image.resize_bilinear of TensorFlow 1 with align_corners=False, float32 [C, size, size].

    Output pixel i is at input position i * in / out, not (i + 0.5) * in / out - 0.5 as everywhere else. The order of
    operations is that of tensorflow/core/kernels/resize_bilinear_op.cc, so that not even rounding differs.
    """
    low_y, high_y, weight_y = _tf1_axis(image_CHW.shape[1], size)
    low_x, high_x, weight_x = _tf1_axis(image_CHW.shape[2], size)
    top, bottom = image_CHW[:, low_y], image_CHW[:, high_y]
    upper = top[:, :, low_x] + (top[:, :, high_x] - top[:, :, low_x]) * weight_x
    lower = bottom[:, :, low_x] + (bottom[:, :, high_x] - bottom[:, :, low_x]) * weight_x
    return upper + (lower - upper) * weight_y[:, None]


def _tf1_axis(size_in: int, size_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper neighbour of each output position, and the weight of the upper one."""
    position = torch.arange(size_out, dtype=torch.float32) * torch.tensor(size_in / size_out, dtype=torch.float32)
    low = position.long()
    return low, (low + 1).clamp_max(size_in - 1), position - low


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` pixels, rounded as torchvision's center_crop rounds."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _channels_first(pixels: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()
