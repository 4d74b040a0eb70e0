"""The tanh-approximated GELU, in half the time of PyTorch's on a CPU."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# 0.5 (1 + tanh(y)) = sigmoid(2 y), with y = sqrt(2 / pi) (x + 0.044715 x^3)
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR


def gelu_tanh(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh"), which is also what runs anywhere but on a CPU.

    PyTorch's vectorised tanh takes several times as long as its sigmoid (torch 2.13), so the CPU gets x * sigmoid(2 y),
    forward and backward, in fp32 for bf16 input.
    """
    return _SigmoidGelu.apply(x) if x.device.type == "cpu" else F.gelu(x, approximate="tanh")


class _SigmoidGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sigmoid = wide.square().mul_(CUBIC).add_(LINEAR).mul_(wide).sigmoid_()
        ctx.save_for_backward(x, sigmoid)
        return (wide * sigmoid).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, sigmoid = ctx.saved_tensors
        wide = x.to(sigmoid.dtype)
        # d/dx = s + x (2 y)' s (1 - s)
        slope = wide.square().mul_(3 * CUBIC).add_(LINEAR).mul_(wide).mul_(sigmoid)
        return slope.addcmul_(slope, sigmoid, value=-1).add_(sigmoid).mul_(gradient).to(x.dtype)
