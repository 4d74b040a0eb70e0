"""MMDiT: image and text tokens in two streams that attend jointly (Stable Diffusion 3, arXiv 2403.03206, figure 2).

Equal in function to SD3Transformer2DModel of diffusers with qk_norm="rms_norm" where all captions have full length.
Shapes: B samples, T image tokens, L text tokens, S = T + L, D width, H heads, E head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megadit.kernels.attention import attention
from megadit.kernels.joint_qkv import joint_qkv
from megadit.models.family import ForwardFlops
from megadit.models.layers import (
    MLP,
    SINUSOID_CHANNELS,
    Modulation,
    Readout,
    centred_positions,
    modulate,
    patch_grid,
    timestep_sinusoid,
)
from megadit.models.mmdit.config import MMDiTConfig


class MMDiT(nn.Module):
    """The velocity (or noise) prediction network. `blocks` are what engines shard.

    Weights come from `megadit.parametrization`; a fresh instance has torch's defaults.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_features = config.width, config.in_channels * config.patch_size**2
        self.patch_embed = nn.Linear(patch_features, width)
        self.text_embed = nn.Linear(config.text_dim, width)
        self.time_embed = MLP(SINUSOID_CHANNELS, width, width, "silu")
        self.pooled_embed = MLP(config.pooled_dim, width, width, "silu")
        last = config.depth - 1
        self.blocks = nn.ModuleList(JointBlock(config, ends_text=index == last) for index in range(config.depth))
        self.final_modulation = Modulation(width, 2)
        self.readout = Readout(width, patch_features)
        self.repa_head = RepaHead(width, config.repa.feature_dim) if config.repa else None

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        *,
        text: Tensor,
        text_lengths: Tensor,
        pooled: Tensor,
        dropped_B: Tensor | None = None,
        return_features: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict a tensor like `x_BCHW`, for timesteps in [0, 1000] (fp32).

        `text` [B, L, text_dim] holds text_lengths [B] tokens per sample; what lies beyond is padding and has no
        influence. `pooled` is [B, pooled_dim]. Where `dropped_B` is true the caption is dropped: it becomes one zero
        token and a zero pooled vector, which the biases of the text projections turn into a learned null caption.
        `return_features` asks for (prediction, features of the REPA head [B, T, feature_dim]). Activations take the
        dtype of the weights. Raises ValueError for an image that is no whole number of patches.
        """
        config = self.config
        grid = patch_grid(x_BCHW, config)
        dtype = self.patch_embed.weight.dtype

        if dropped_B is not None:
            text_lengths = torch.where(dropped_B, 1, text_lengths)
            text = text.masked_fill(dropped_B[:, None, None], 0)
            pooled = pooled.masked_fill(dropped_B[:, None], 0)
        text_mask_BL = torch.arange(text.shape[1], device=text.device) < text_lengths[:, None]
        key_mask_BS = torch.nn.functional.pad(text_mask_BL, (grid[0] * grid[1], 0), value=True)
        text = text.to(dtype).masked_fill(~text_mask_BL[:, :, None], 0)  # a NaN in the padding would pass the mask

        image_BTD = self.patch_embed(patchify(x_BCHW.to(dtype), config.patch_size))
        image_BTD = image_BTD + centred_positions(grid, config, x_BCHW.device).to(image_BTD.dtype)
        text_BLD = self.text_embed(text)
        condition_BD = self.time_embed(timestep_sinusoid(timestep_B).to(dtype)) + self.pooled_embed(pooled.to(dtype))
        condition_BD = torch.nn.functional.silu(condition_BD)

        for number, block in enumerate(self.blocks, start=1):
            image_BTD, text_BLD = block(image_BTD, text_BLD, condition_BD, key_mask_BS)
            if return_features and config.repa and number == config.repa.block:
                features_BTF = self.repa_head(image_BTD)  # type: ignore[misc]

        shift, scale = self.final_modulation(condition_BD)
        prediction = self.readout(modulate(image_BTD, shift, scale))
        prediction = unpatchify(prediction, config.in_channels, config.patch_size, grid)
        return (prediction, features_BTF) if return_features else prediction


class RepaHead(nn.Module):
    """Three layers with SiLU from image tokens to features of a pretrained encoder (REPA, arXiv 2410.06940, 3.1).

    The hidden layers are as wide as the model, not 2048 as in the paper: so that under muP they are hidden matrices,
    and only the last layer leaves the width.
    """

    def __init__(self, width: int, feature_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.readout = Readout(width, feature_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, feature_dim]."""
        silu = torch.nn.functional.silu
        return self.readout(silu(self.fc2(silu(self.fc1(x_BTD)))))


class JointBlock(nn.Module):
    """One block: both streams attend to the tokens of both, then each goes through its own MLP.

    The last block `ends_text`: there, text gives keys and values to the image and goes no further.
    """

    def __init__(self, config: MMDiTConfig, *, ends_text: bool) -> None:
        super().__init__()
        self.image = Modality(config, ends_here=False)
        self.text = Modality(config, ends_here=ends_text)
        self.qk_norm = JointQKNorm(config.head_dim)

    def forward(
        self, image_BTD: Tensor, text_BLD: Tensor, condition_BD: Tensor, key_mask_BS: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Both streams after the block; None for a text stream that ends here."""
        num_image_tokens = image_BTD.shape[1]
        image_qkv, *image_rest = self.image.prepare(image_BTD, condition_BD)
        text_qkv, *text_rest = self.text.prepare(text_BLD, condition_BD)
        q, k, v = self.qk_norm(image_qkv, text_qkv)
        attended = attention(q, k, v, key_mask_BS).flatten(2)
        image_BTD = self.image.finish(image_BTD, attended[:, :num_image_tokens], image_rest)
        if self.text.ends_here:
            return image_BTD, None
        return image_BTD, self.text.finish(text_BLD, attended[:, num_image_tokens:], text_rest)


class JointQKNorm(nn.Module):
    """RMS norm of the queries and keys of both streams, and the joint sequence of what comes out."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.image_q = nn.Parameter(torch.ones(head_dim))
        self.image_k = nn.Parameter(torch.ones(head_dim))
        self.text_q = nn.Parameter(torch.ones(head_dim))
        self.text_k = nn.Parameter(torch.ones(head_dim))

    def forward(self, image_qkv: Tensor, text_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, S, H, E] from the qkv projections of both streams."""
        image_weights, text_weights = torch.stack([self.image_q, self.image_k]), torch.stack([self.text_q, self.text_k])
        return joint_qkv(image_qkv, text_qkv, image_weights, text_weights)


class Modality(nn.Module):
    """The weights of one kind of token in a block; where the stream ends, only those that feed the attention.

    (Even there the queries are computed, as in SD3: their weights are idle.)
    """

    def __init__(self, config: MMDiTConfig, *, ends_here: bool) -> None:
        super().__init__()
        width = config.width
        self.ends_here = ends_here
        self.modulation = Modulation(width, 2 if ends_here else 6)
        self.qkv = nn.Linear(width, 3 * width)
        if not ends_here:
            self.proj = nn.Linear(width, width)
            self.mlp = MLP(width, config.mlp_ratio * width, width, "gelu_tanh")

    def prepare(self, x_BTD: Tensor, condition_BD: Tensor) -> tuple[Tensor, ...]:
        """The qkv projection [B, T, 3 * D], and the modulation that `finish` needs."""
        shift, scale, *rest = self.modulation(condition_BD)
        return self.qkv(modulate(x_BTD, shift, scale)), *rest

    def finish(self, x_BTD: Tensor, attended_BTD: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """Add the projected attention output and the MLP, each times its gate."""
        gate_attention, shift, scale, gate_mlp = modulation
        x_BTD = torch.addcmul(x_BTD, gate_attention, self.proj(attended_BTD))
        return torch.addcmul(x_BTD, gate_mlp, self.mlp(modulate(x_BTD, shift, scale)))


def patchify(x_BCHW: Tensor, patch_size: int) -> Tensor:
    """[B, T, C * p * p]: patches row by row, each flattened as (channel, row, column)."""
    B, C, H, W = x_BCHW.shape
    x = x_BCHW.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(x_BTF: Tensor, channels: int, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for a grid of patches."""
    x = x_BTF.unflatten(1, grid).unflatten(3, (channels, patch_size, patch_size))
    # (By reshape, which copies: FSDP2 warns of a result that is a view.)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), channels, grid[0] * patch_size, grid[1] * patch_size)


def forward_flops(config: MMDiTConfig, num_text_tokens: int) -> ForwardFlops:
    """What one sample takes whose caption has so many tokens, with attention as a product of all pairs.

    REPA's head counts where there is one: training runs it, sampling does not.
    """
    D, T, L = config.width, (config.input_size // config.patch_size) ** 2, num_text_tokens
    patch_features = config.in_channels * config.patch_size**2
    stream_per_token = (4 + 2 * config.mlp_ratio) * D * D
    block = (T + L) * stream_per_token + 2 * (T + L) ** 2 * D + 12 * D * D
    idle_in_last = L * (stream_per_token - 3 * D * D) + 4 * D * D  # the text stream ends there
    first_layers = (T * patch_features + L * config.text_dim + SINUSOID_CHANNELS + config.pooled_dim) * D
    second_layers = 2 * D * D  # of time and of the pooled text
    final = 2 * D * D + T * D * patch_features
    repa_head = T * (2 * D * D + D * config.repa.feature_dim) if config.repa else 0
    return ForwardFlops(
        blocks=(2 * block,) * (config.depth - 1) + (2 * (block - idle_in_last),),
        outside=2 * (first_layers + second_layers + final + repa_head),
        first_layers=2 * first_layers,
        attention=4 * config.depth * (T + L) ** 2 * D,
    )
