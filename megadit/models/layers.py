"""Layers that more than one model family uses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadit.kernels.gelu import gelu_tanh

SINUSOID_CHANNELS = 256
NORM_EPS = 1e-6


class Readout(nn.Linear):
    """A linear layer from width to something that is not width: Linear(multiplier * x).

    The float `multiplier` is the only place where muP touches a model (output_mult / m; Tensor Programs V, arXiv
    2203.03466, table 8). It stays in the forward pass; the bias is not scaled.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.multiplier = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.multiplier)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, multiplier={self.multiplier}"


class Modulation(nn.Linear):
    """Shifts, scales and gates of adaptive layer norm, linear in the condition (DiT, arXiv 2212.09748, 3.2)."""

    def __init__(self, width: int, num_vectors: int) -> None:
        super().__init__(width, num_vectors * width)
        self.num_vectors = num_vectors

    def forward(self, c_BD: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """`num_vectors` tensors [B, 1, D] from SiLU(condition) [B, D]."""
        return super().forward(c_BD)[:, None].chunk(self.num_vectors, dim=-1)


class MLP(nn.Module):
    """Two linear layers with SiLU or tanh-approximated GELU between them."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, activation: str) -> None:
        super().__init__()
        assert activation in ("silu", "gelu_tanh"), activation
        self.activation = activation
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(F.silu(x) if self.activation == "silu" else gelu_tanh(x))


def modulate(x_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, without learned affine parameters."""
    return torch.addcmul(shift_B1D, F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=NORM_EPS), 1 + scale_B1D)


def timestep_sinusoid(t_B: Tensor) -> Tensor:
    """[B, 256] features of a time in [0, 1], cosines first, of 1000 t at frequencies from 1 down to 1/10000.

    Always fp32: in bf16 the last 2 per mille of the time axis would be one point.
    """
    half = SINUSOID_CHANNELS // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t_B.device) * (-math.log(10000) / half))
    angles = t_B.float()[:, None] * 1000 * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(side: int, width: int, device: torch.device) -> Tensor:
    """[side * side, width] sine-cosine positions of a square grid, row by row: first the column's half, then the row's.

    Computed in every forward pass from a [side, width / 2] table, which costs next to nothing: a buffer would be one
    more thing that meta-device construction, sharding and checkpoints have to carry.
    """
    omega = 10000 ** (-torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64, device=device)[:, None] * omega
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).float()
    columns = table[None, :, :].expand(side, side, -1)
    rows = table[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).view(side * side, width)
