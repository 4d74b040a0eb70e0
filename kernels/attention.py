"""The attention of every model: one entry point, which is PyTorch's scaled dot-product attention.

Layout: [B, S, H, D] (batch, sequence, heads, head dimension), which is what a fused qkv projection gives without a
copy, and what the FlashAttention packages take.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, key_mask_BS: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, shape [B, S, H, D] and dtype of `v_BSHD`.

    `key_mask_BS` (bool) is True where a key may be attended to; a hidden key has exactly no influence. Every sample
    needs at least one visible key.
    """
    mask_BHSS = None if key_mask_BS is None else key_mask_BS[:, None, None, :]
    out_BHSD = F.scaled_dot_product_attention(
        q_BSHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2), attn_mask=mask_BHSS
    )
    return out_BHSD.transpose(1, 2)


def describe() -> str:
    """What runs on this machine, for the start-up banner."""
    if not torch.cuda.is_available():
        return "scaled_dot_product_attention of PyTorch (CPU kernels)"
    backends = torch.backends.cuda
    enabled = {
        "cuDNN": backends.cudnn_sdp_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }
    return f"scaled_dot_product_attention of PyTorch (CUDA; allowed: {', '.join(k for k, on in enabled.items() if on)})"
