"""Layers that more than one model family uses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadit.kernels.attention import attention
from megadit.kernels.gelu import gelu_tanh
from megadit.models.family import ModelConfig

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


def grid_positions(rows_H: Tensor, columns_W: Tensor, width: int) -> Tensor:
    """[H * W, width] sine-cosine positions of a grid, row by row: first the column's half, then the row's.

    MMDiT computes them in every forward pass, which costs next to nothing: a buffer is one more thing that meta-device
    construction, sharding and checkpoints have to carry. DiT and PixArt have one, as their checkpoints do.
    """
    omega = 10000 ** (-torch.arange(width // 4, dtype=torch.float64, device=rows_H.device) / (width // 4))
    columns, rows = (
        torch.cat([angles.sin(), angles.cos()], dim=-1).float()
        for angles in (columns_W[:, None] * omega, rows_H[:, None] * omega)
    )
    height = len(rows)
    columns, rows = columns.expand(height, -1, -1), rows[:, None].expand(-1, len(columns), -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def stretched_positions(grid: tuple[int, int], config: ModelConfig, device: torch.device) -> Tensor:
    """`grid_positions` of H x W patches over the range of the square that the model is named after.

    PixArt-alpha's rule for aspect-ratio buckets (its PixArtMS.py).
    """
    base = config.input_size // config.patch_size
    axes = [torch.arange(n, dtype=torch.float64, device=device) * (base / n) for n in grid]
    return grid_positions(axes[0], axes[1], config.width)


def centred_positions(grid: tuple[int, int], config: ModelConfig, device: torch.device) -> Tensor:
    """`grid_positions` of H x W patches one apart, around the middle of the square that the model is named after.

    SD3's rule (arXiv 2403.03206, section 5.3.2), which crops them from a larger table.
    """
    base = config.input_size // config.patch_size
    axes = [torch.arange(n, dtype=torch.float64, device=device) + (base - n) // 2 for n in grid]
    return grid_positions(axes[0], axes[1], config.width)


def fixed_positions(config: ModelConfig) -> Tensor:
    """Positions of a square [1, T, D], on the CPU: as a buffer they have values in a meta-device model, too."""
    base = config.input_size // config.patch_size
    return stretched_positions((base, base), config, torch.device("cpu"))[None]


def add_positions(x_BTD: Tensor, grid: tuple[int, int], config: ModelConfig, fixed_1TD: Tensor) -> Tensor:
    """Tokens plus their positions: `fixed_1TD` for the square that the model is named after."""
    base = config.input_size // config.patch_size
    positions = fixed_1TD if grid == (base, base) else stretched_positions(grid, config, x_BTD.device)
    return x_BTD + positions.to(x_BTD.dtype)


def image_of_patches(x_BTF: Tensor, channels: int, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The image [B, C, H, W] of a grid of patches row by row, each flattened as (row, column, channel)."""
    x = x_BTF.unflatten(1, grid).unflatten(3, (patch_size, patch_size, channels))
    # (By reshape, which copies: FSDP2 warns of a result that is a view.)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), channels, grid[0] * patch_size, grid[1] * patch_size)


def patch_grid(x_BCHW: Tensor, config: ModelConfig) -> tuple[int, int]:
    """How many patches high and wide images are.

    Raises ValueError for images of other channels than the recipe's, or that are no whole number of patches.
    """
    _, channels, height, width = x_BCHW.shape
    if channels != config.in_channels or height % config.patch_size or width % config.patch_size:
        raise ValueError(
            f"the model takes images of {config.in_channels} channels and sides that are multiples of "
            f"{config.patch_size}, not {list(x_BCHW.shape)}"
        )
    return height // config.patch_size, width // config.patch_size
