"""PixArt-alpha: text by cross-attention, and one modulation for all blocks (arXiv 2310.00426, section 2.3).

Equal in function to PixArt.py of PixArt-alpha/PixArt-alpha for 256x256 pixels, with the names of its published
checkpoints, and to PixArtTransformer2DModel of diffusers (interpolation_scale 1, no size conditions).
Shapes: B samples, T image tokens, L text tokens, D width.
"""

import math

import torch
from torch import Tensor, nn

from megadit.kernels.attention import attention
from megadit.models.family import ForwardFlops
from megadit.models.layers import (
    MLP,
    SINUSOID_CHANNELS,
    PatchEmbed,
    Readout,
    SelfAttention,
    TimestepEmbedder,
    add_positions,
    fixed_positions,
    image_of_patches,
    modulate,
    patch_grid,
)
from megadit.models.pixart.config import PixArtConfig
from megadit.randomness import named_generator


class PixArt(nn.Module):
    """The noise (or velocity) prediction network. `blocks` are what engines shard.

    Weights come from `megadit.parametrization`; a fresh instance has torch's defaults. The positions and the null
    caption are buffers, which the published checkpoints store.
    """

    pos_embed: Tensor

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, width)
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config.max_text_tokens, config.text_dim, width)
        self.register_buffer("pos_embed", fixed_positions(config))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch_size**2 * config.out_channels)

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        *,
        text: Tensor,
        text_lengths: Tensor,
        dropped_B: Tensor | None = None,
    ) -> Tensor:
        """Predict [B, out_channels, H, W] for timesteps in [0, 1000] (fp32).

        `text` [B, L, text_dim] holds text_lengths [B] tokens per sample, at least one; what lies beyond is padding and
        has no influence. Where `dropped_B` is true, as many tokens of the null caption take the caption's place.
        Activations take the dtype of the weights. Raises ValueError for an image that is no whole number of patches,
        and for text of more than max_text_tokens tokens.
        """
        grid = patch_grid(x_BCHW, self.config)
        if text.shape[1] > self.config.max_text_tokens:
            raise ValueError(f"the model takes at most {self.config.max_text_tokens} text tokens, not {text.shape[1]}")
        dtype = self.x_embedder.proj.weight.dtype
        x_BTD = add_positions(self.x_embedder(x_BCHW.to(dtype)), grid, self.config, self.pos_embed)
        time_BD = self.t_embedder(timestep_B, dtype)
        modulation_B6D = self.t_block(time_BD).unflatten(-1, (6, -1))
        text_mask_BL = torch.arange(text.shape[1], device=text.device) < text_lengths[:, None]
        text_BLD = self.y_embedder(text.to(dtype), text_mask_BL, dropped_B)
        for block in self.blocks:
            x_BTD = block(x_BTD, modulation_B6D, text_BLD, text_mask_BL)
        patches_BTF = self.final_layer(x_BTD, time_BD)
        return image_of_patches(patches_BTF, self.config.out_channels, self.config.patch_size, grid)


class CaptionEmbedder(nn.Module):
    """Captions as tokens of the model's width. The null caption is random and never trained, as published."""

    y_embedding: Tensor

    def __init__(self, max_text_tokens: int, text_dim: int, width: int) -> None:
        super().__init__()
        self.y_proj = MLP(text_dim, width, width, "gelu_tanh")
        generator = named_generator(0, "y_embedder.y_embedding")
        null_caption = torch.randn(max_text_tokens, text_dim, generator=generator, device="cpu")
        self.register_buffer("y_embedding", null_caption / math.sqrt(text_dim))

    def forward(self, text_BLF: Tensor, mask_BL: Tensor, dropped_B: Tensor | None) -> Tensor:
        """[B, L, D] of text features [B, L, text_dim]; the null caption's where `dropped_B` is true."""
        if dropped_B is not None:
            null_caption = self.y_embedding[: text_BLF.shape[1]].to(text_BLF.dtype)
            text_BLF = torch.where(dropped_B[:, None, None], null_caption, text_BLF)
        return self.y_proj(text_BLF.masked_fill(~mask_BL[:, :, None], 0))  # a NaN in the padding would pass the mask


class Block(nn.Module):
    """Self-attention and MLP with modulated layer norms and gates, and between them cross-attention without either."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        width = config.width
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / math.sqrt(width))
        self.attn = SelfAttention(width, config.head_dim)
        self.cross_attn = CrossAttention(width, config.head_dim)
        self.mlp = MLP(width, config.mlp_ratio * width, width, "gelu_tanh")

    def forward(self, x_BTD: Tensor, modulation_B6D: Tensor, text_BLD: Tensor, text_mask_BL: Tensor) -> Tensor:
        modulation = (self.scale_shift_table + modulation_B6D).to(x_BTD.dtype).chunk(6, dim=1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation
        x_BTD = torch.addcmul(x_BTD, gate_attention, self.attn(modulate(x_BTD, shift_attention, scale_attention)))
        x_BTD = x_BTD + self.cross_attn(x_BTD, text_BLD, text_mask_BL)
        return torch.addcmul(x_BTD, gate_mlp, self.mlp(modulate(x_BTD, shift_mlp, scale_mlp)))


class CrossAttention(nn.Module):
    """Every image token attends to the tokens of its caption."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, text_BLD: Tensor, text_mask_BL: Tensor) -> Tensor:
        q = self.q_linear(x_BTD).unflatten(-1, (-1, self.head_dim))
        k, v = self.kv_linear(text_BLD).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
        return self.proj(attention(q, k, v, text_mask_BL).flatten(2))


class FinalLayer(nn.Module):
    """From tokens [B, T, D] to the features of their patches [B, T, F]."""

    def __init__(self, width: int, patch_features: int) -> None:
        super().__init__()
        self.linear = Readout(width, patch_features)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / math.sqrt(width))

    def forward(self, x_BTD: Tensor, time_BD: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time_BD[:, None]).to(x_BTD.dtype).chunk(2, dim=1)
        return self.linear(modulate(x_BTD, shift, scale))


def forward_flops(config: PixArtConfig, num_text_tokens: int) -> ForwardFlops:
    """What one sample takes whose caption has so many tokens, with attention as a product of all pairs."""
    D, T, L, p = config.width, (config.input_size // config.patch_size) ** 2, num_text_tokens, config.patch_size
    self_attention_and_mlp = T * (4 + 2 * config.mlp_ratio) * D * D + 2 * T * T * D
    cross_attention = (2 * T + 2 * L) * D * D + 2 * T * L * D
    first_layers = T * config.in_channels * p * p * D + SINUSOID_CHANNELS * D + L * config.text_dim * D
    second_layers = D * D + 6 * D * D + L * D * D  # of time, of the modulation, of text
    final = T * D * config.out_channels * p * p
    return ForwardFlops(
        blocks=(2 * (self_attention_and_mlp + cross_attention),) * config.depth,
        outside=2 * (first_layers + second_layers + final),
        first_layers=2 * first_layers,
        attention=4 * config.depth * T * (T + L) * D,
    )
