"""EfficientNet-lite0: EfficientNet (arXiv 1905.11946) without squeeze-and-excitation, under its package's key names.

Weights for ImageNet of 18.8 MB that come as a pip package, so a Frechet distance on real features can be had anywhere.
It is no FID and is not called one. 0.8 GFLOP an image.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from megadit.eval.resize import Pixels
from megadit.eval.weights import load_file

FEATURE_DIM = 1280
INPUT_SIZE = 224
BN_EPS = 1e-3
STEM_DIM, HEAD_DIM = 32, FEATURE_DIM
# (blocks, kernel, stride, expansion, channels) of each stage: efficientnet_lite_builder.py of tensorflow/tpu.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """float32 [B, 3, 224, 224] of `prepare` to the mean of the last feature map, [B, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, STEM_DIM, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(STEM_DIM, eps=BN_EPS)
        self._blocks = nn.ModuleList()
        widths = [STEM_DIM, *(stage[-1] for stage in STAGES)]
        for (dim_in, dim_out), (num_blocks, kernel, stride, expansion, _) in zip(pairwise(widths), STAGES, strict=True):
            self._blocks.append(_Block(dim_in, dim_out, kernel, stride, expansion))
            self._blocks.extend(_Block(dim_out, dim_out, kernel, 1, expansion) for _ in range(num_blocks - 1))
        self._conv_head = _SameConv(widths[-1], HEAD_DIM, 1)
        self._bn1 = nn.BatchNorm2d(HEAD_DIM, eps=BN_EPS)
        self._fc = nn.Linear(HEAD_DIM, 1000)  # of ImageNet; here because the file has it

    def forward(self, x: Tensor) -> Tensor:
        x = relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))


class _Block(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        dim = dim_in * expansion
        self._expands, self._skips = expansion != 1, stride == 1 and dim_in == dim_out
        if self._expands:
            self._expand_conv = _SameConv(dim_in, dim, 1)
            self._bn0 = nn.BatchNorm2d(dim, eps=BN_EPS)
        self._depthwise_conv = _SameConv(dim, dim, kernel, stride=stride, groups=dim)
        self._bn1 = nn.BatchNorm2d(dim, eps=BN_EPS)
        self._project_conv = _SameConv(dim, dim_out, 1)
        self._bn2 = nn.BatchNorm2d(dim_out, eps=BN_EPS)

    def forward(self, inputs: Tensor) -> Tensor:
        x = relu6(self._bn0(self._expand_conv(inputs))) if self._expands else inputs
        x = relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + inputs if self._skips else x


class _SameConv(nn.Conv2d):
    """TensorFlow's "SAME" padding: ceil(size / stride) outputs, the odd pixel of padding at the end."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(dim_in, dim_out, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, size = self.kernel_size[0], self.stride[0], x.shape[-1]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        before, after = total // 2, total - total // 2
        return super().forward(pad(x, (before, after, before, after)))


def prepare(pixels: Pixels) -> Tensor:
    """uint8 [H, W, 3] to float32 [3, 224, 224]: PIL's bicubic, then (x - 127) / 128 as efficientnet_lite_builder.py."""
    image = Image.fromarray(pixels).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - 127) / 128


class EfficientNetEncoder:
    """The network with its preprocessing."""

    def __init__(self, path: Path, device: torch.device) -> None:
        network = EfficientNetLite0()
        load_file(network, path)
        self.prepare = prepare
        self._network = network.to(device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._network(images)
