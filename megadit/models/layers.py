"""Layers that more than one model family uses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadit.kernels.attention import attention
from megadit.kernels.gelu import gelu_tanh
from megadit.recipe import ModelConfig

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


class PatchEmbed(nn.Module):
    """Square patches of an image as tokens [B, T, D], row by row: a convolution whose stride is its kernel."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj(x_BCHW).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """Timesteps [B] in [0, 1000] as vectors [B, D], by a sinusoid and two linear layers."""

    def __init__(self, width: int, freq_shift: int = 0) -> None:
        super().__init__()
        self.freq_shift = freq_shift
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep_B: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_sinusoid(timestep_B, self.freq_shift).to(dtype))


class SelfAttention(nn.Module):
    """Every token attends to every token, in heads of `head_dim` features."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        return self.proj(attention(q, k, v).flatten(2))


def modulate(x_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, without learned affine parameters."""
    return torch.addcmul(shift_B1D, F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=NORM_EPS), 1 + scale_B1D)


def timestep_sinusoid(timestep_B: Tensor, freq_shift: int = 0) -> Tensor:
    """[B, 256] features of timesteps in [0, 1000], cosines first, at 128 frequencies from 1 down to about 1/10000.

    Frequency i is 10000^-(i / (128 - freq_shift)); with `freq_shift` 1 the last is 1/10000 itself. Always fp32: in bf16
    the last four of a thousand timesteps would be one.
    """
    half = SINUSOID_CHANNELS // 2
    # In the order of the published code: at timestep 1000 a last bit of a frequency is 1e-4 of an angle.
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep_B.device)
    angles = timestep_B.float()[:, None] * torch.exp(exponents / (half - freq_shift))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(side: int, width: int, device: torch.device) -> Tensor:
    """[side * side, width] sine-cosine positions of a square grid, row by row: first the column's half, then the row's.

    MMDiT computes them in every forward pass, which costs next to nothing: a buffer is one more thing that meta-device
    construction, sharding and checkpoints have to carry. DiT and PixArt have one, as their checkpoints do.
    """
    omega = 10000 ** (-torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64, device=device)[:, None] * omega
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).float()
    columns = table[None, :, :].expand(side, side, -1)
    rows = table[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).view(side * side, width)


def fixed_positions(config: ModelConfig) -> Tensor:
    """`grid_positions` of a model [1, T, D], on the CPU: as a buffer they have values in a meta-device model, too."""
    return grid_positions(config.input_size // config.patch_size, config.width, torch.device("cpu"))[None]


def image_of_patches(x_BTF: Tensor, channels: int, patch_size: int) -> Tensor:
    """The square image [B, C, H, W] of patches row by row, each flattened as (row, column, channel)."""
    side = round(x_BTF.shape[1] ** 0.5)
    x = x_BTF.unflatten(1, (side, side)).unflatten(3, (patch_size, patch_size, channels))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], channels, side * patch_size, side * patch_size)


def require_image_shape(x_BCHW: Tensor, config: ModelConfig) -> None:
    """Raise ValueError for images of another size than the recipe's."""
    if x_BCHW.shape[1:] != (config.in_channels, config.input_size, config.input_size):
        expected = f"[B, {config.in_channels}, {config.input_size}, {config.input_size}]"
        raise ValueError(f"the model takes images of shape {expected}, not {list(x_BCHW.shape)}")
