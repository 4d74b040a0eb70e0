"""The Inception of FID: Google's of December 2015, with the key names of pytorch-fid's and torch-fidelity's file.

It is not torchvision's inception_v3: the weights are others, average pools leave the padding out, the last pool is a
maximum, and there are 1008 classes (see pytorch-fid's inception.py, which found these). 566 tensors, 23.9 M parameters,
11.4 GFLOP an image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from megadit.eval.resize import Resizer
from megadit.eval.weights import load_file

POOL_DIM, NUM_CLASSES = 2048, 1008
SPATIAL_CHANNELS = 7  # ADM's sFID takes the first 7 channels of mixed_6/conv, 17 x 17 each
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
# Where each of Features lies in what the encoder gives.
POOL = slice(0, POOL_DIM)
LOGITS = slice(POOL.stop, POOL.stop + NUM_CLASSES)
SPATIAL = slice(LOGITS.stop, LOGITS.stop + SPATIAL_DIM)


class Features(NamedTuple):
    """What the metrics take, float32 each."""

    pool_BD: Tensor
    """Mean of the last feature map, [B, 2048]: FID, precision and recall, KID."""
    logits_BC: Tensor
    """pool @ fc.weight.T without the bias, [B, 1008]: Inception score, as in TTUR and ADM."""
    spatial_BS: Tensor
    """Channels 0 to 6 of mixed_6/conv, [B, 17 * 17 * 7] in the order height, width, channel: sFID."""


class Inception(nn.Module):
    """Takes float32 [B, 3, 299, 299] in about [-1, 1] from one of eval/resize.py."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _InceptionA(192, 32)
        self.Mixed_5c = _InceptionA(256, 64)
        self.Mixed_5d = _InceptionA(288, 64)
        self.Mixed_6a = _InceptionB(288)
        self.Mixed_6b = _InceptionC(768, 128)
        self.Mixed_6c = _InceptionC(768, 160)
        self.Mixed_6d = _InceptionC(768, 160)
        self.Mixed_6e = _InceptionC(768, 192)
        self.Mixed_7a = _InceptionD(768)
        self.Mixed_7b = _InceptionE(1280, max_pool=False)
        self.Mixed_7c = _InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(POOL_DIM, NUM_CLASSES)

    def forward(self, x: Tensor) -> Features:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = max_pool2d(x, kernel_size=3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = max_pool2d(x, kernel_size=3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # The 1x1 branch, which TensorFlow calls mixed_6/conv, is the first in the concatenation.
        spatial_BHWC = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool_BD = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return Features(pool_BD, pool_BD.mm(self.fc.weight.T), spatial_BHWC.flatten(1))


class _Conv(nn.Module):
    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(dim_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)), inplace=True)


class _InceptionA(nn.Module):
    def __init__(self, dim_in: int, pool_dim: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(dim_in, 64, 1)
        self.branch5x5_1 = _Conv(dim_in, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(dim_in, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(dim_in, pool_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3dbl, self.branch_pool(_average(x))], 1)


class _InceptionB(nn.Module):
    def __init__(self, dim_in: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(dim_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(dim_in, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, max_pool2d(x, kernel_size=3, stride=2)], 1)


class _InceptionC(nn.Module):
    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(dim_in, 192, 1)
        self.branch7x7_1 = _Conv(dim_in, dim, 1)
        self.branch7x7_2 = _Conv(dim, dim, (1, 7), padding=(0, 3))
        self.branch7x7_3 = _Conv(dim, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = _Conv(dim_in, dim, 1)
        self.branch7x7dbl_2 = _Conv(dim, dim, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = _Conv(dim, dim, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = _Conv(dim, dim, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = _Conv(dim, 192, (1, 7), padding=(0, 3))
        self.branch_pool = _Conv(dim_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        return torch.cat([self.branch1x1(x), branch7x7, branch7x7dbl, self.branch_pool(_average(x))], 1)


class _InceptionD(nn.Module):
    def __init__(self, dim_in: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(dim_in, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(dim_in, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([branch3x3, branch7x7x3, max_pool2d(x, kernel_size=3, stride=2)], 1)


class _InceptionE(nn.Module):
    def __init__(self, dim_in: int, max_pool: bool) -> None:
        super().__init__()
        self._max_pool = max_pool
        self.branch1x1 = _Conv(dim_in, 320, 1)
        self.branch3x3_1 = _Conv(dim_in, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(dim_in, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(dim_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool2d(x, kernel_size=3, stride=1, padding=1) if self._max_pool else _average(x)
        branch3x3 = self.branch3x3_1(x)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(branch3x3),
            self.branch3x3_2b(branch3x3),
            self.branch3x3dbl_3a(branch3x3dbl),
            self.branch3x3dbl_3b(branch3x3dbl),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, 1)


def _average(x: Tensor) -> Tensor:
    """The 3x3 mean without the padding, as TensorFlow takes it."""
    return avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class InceptionEncoder:
    """All of Features side by side, float32 [B, 2048 + 1008 + 2023], of pictures resized by `resizer`."""

    def __init__(self, path: Path, device: torch.device, resizer: Resizer) -> None:
        network = Inception()
        load_file(network, path)
        self.prepare = resizer
        self._network = network.to(device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.cat(self._network(images), dim=1)
