"""From two fused qkv projections to the q, k, v of one joint attention, with RMS-normalised queries and keys.

Plain PyTorch writes every intermediate of this step (split, normalise, concatenate, and the same backwards) to memory
of its own; here each result is written once, where the next operation reads it. `joint_qkv_reference` is the
definition.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6


def joint_qkv(
    image_BTF: Tensor, text_BLF: Tensor, image_norm_2E: Tensor, text_norm_2E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T + L, H, E] (image first) from projections [B, T, 3 * H * E] and [B, L, 3 * H * E].

    Projected features are ordered (qkv, head, E).

    Queries and keys of each stream are divided by their root mean square over E and multiplied by rows 0 and 1 of
    its norm weights [2, E] (arXiv 2403.03206, section 5.3.2). Mean squares are fp32 for bf16 input.

    Under torch.compile the definition is traced instead: the compiler fuses it, and cannot trace writes into slices.
    """
    if torch.compiler.is_compiling():
        return joint_qkv_reference(
            image_BTF, text_BLF, image_norm_2E.to(image_BTF.dtype), text_norm_2E.to(text_BLF.dtype)
        )
    return _JointQKV.apply(image_BTF, text_BLF, image_norm_2E.to(image_BTF.dtype), text_norm_2E.to(text_BLF.dtype))


def joint_qkv_reference(
    image_BTF: Tensor, text_BLF: Tensor, image_norm_2E: Tensor, text_norm_2E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by PyTorch's own operations: what is tested against, and what is compiled."""
    streams = []
    for x, norm in ((image_BTF, image_norm_2E), (text_BLF, text_norm_2E)):
        q, k, v = x.unflatten(-1, (3, -1, norm.shape[-1])).unbind(2)
        q, k = (torch.nn.functional.rms_norm(y, y.shape[-1:], w, EPS) for y, w in zip((q, k), norm, strict=True))
        streams.append((q, k, v))
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
    return q, k, v


class _JointQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image_BTF: Tensor, text_BLF: Tensor, image_norm_2E: Tensor, text_norm_2E: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        head_dim = image_norm_2E.shape[-1]
        B, T, F = image_BTF.shape
        S = T + text_BLF.shape[1]
        qkv = [image_BTF.new_empty(B, S, F // (3 * head_dim), head_dim) for _ in range(3)]
        saved = []
        for x_BTF, norm_2E, tokens in (
            (image_BTF, image_norm_2E, slice(0, T)),
            (text_BLF, text_norm_2E, slice(T, S)),
        ):
            parts = x_BTF.unflatten(-1, (3, -1, head_dim)).unbind(2)
            for part, weight_E, out in zip(parts, norm_2E, qkv, strict=False):  # queries and keys
                inverse_rms = _inverse_rms(part)
                normalised = part * inverse_rms
                torch.mul(normalised, weight_E, out=out[:, tokens])
                saved += [normalised, inverse_rms]
            qkv[2][:, tokens] = parts[2]
        ctx.save_for_backward(image_norm_2E, text_norm_2E, *saved)
        q, k, v = qkv
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        image_norm_2E, text_norm_2E, *saved = ctx.saved_tensors
        T = saved[0].shape[1]
        inputs, norms = [], []
        for norm_2E, stream, tokens in (
            (image_norm_2E, saved[:4], slice(0, T)),
            (text_norm_2E, saved[4:], slice(T, None)),
        ):
            B, length, H, E = stream[0].shape
            grad_x = gradients[0].new_empty(B, length, 3, H, E)
            grad_norm = torch.empty_like(norm_2E)
            for i in range(2):
                normalised, inverse_rms = stream[2 * i : 2 * i + 2]
                g = gradients[i][:, tokens]
                rows = (g * normalised).reshape(-1, E)
                grad_norm[i] = rows.sum(0)
                # d/dx of n * w, n = x / rms(x): (g w - n mean(g w n)) / rms(x)
                mean = torch.mv(rows, norm_2E[i]).div_(E).view(B, length, H, 1)
                torch.mul((g * norm_2E[i]).addcmul_(normalised, mean, value=-1), inverse_rms, out=grad_x[:, :, i])
            grad_x[:, :, 2] = gradients[2][:, tokens]
            inputs.append(grad_x.view(B, length, 3 * H * E))
            norms.append(grad_norm)
        return *inputs, *norms


def _inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, [..., 1], summed in fp32 at least."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_().to(x.dtype)
