"""DiT: a class-conditional transformer with adaptive layer norm (arXiv 2212.09748, section 3.2).

Equal in function to models.py of facebookresearch/DiT, with the names of its published checkpoints, and, where
`timestep_freq_shift` is 1, to DiTTransformer2DModel of diffusers.
Shapes: B samples, T image tokens, D width.
"""

import torch
from torch import Tensor, nn

from megadit.models.dit.config import DiTConfig
from megadit.models.family import ForwardFlops
from megadit.models.layers import (
    MLP,
    SINUSOID_CHANNELS,
    Modulation,
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


class DiT(nn.Module):
    """The noise (or velocity) prediction network. `blocks` are what engines shard.

    Weights come from `megadit.parametrization`; a fresh instance has torch's defaults. `pos_embed` is a buffer, which
    the published checkpoints store.
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, config.width)
        self.t_embedder = TimestepEmbedder(config.width, config.timestep_freq_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        self.register_buffer("pos_embed", fixed_positions(config))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch_size**2 * config.out_channels)

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, *, labels: Tensor, dropped_B: Tensor | None = None) -> Tensor:
        """Predict [B, out_channels, H, W] for timesteps in [0, 1000] (fp32).

        `labels` [B] are classes in [0, num_classes); where `dropped_B` is true the null class takes their place.
        Activations take the dtype of the weights. Raises ValueError for an image that is no whole number of patches,
        and, on a CPU, for a label out of range.
        """
        grid = patch_grid(x_BCHW, self.config)
        dtype = self.x_embedder.proj.weight.dtype
        x_BTD = add_positions(self.x_embedder(x_BCHW.to(dtype)), grid, self.config, self.pos_embed)
        condition_BD = self.t_embedder(timestep_B, dtype) + self.y_embedder(labels, dropped_B)
        for block in self.blocks:
            x_BTD = block(x_BTD, condition_BD)
        patches_BTF = self.final_layer(x_BTD, condition_BD)
        return image_of_patches(patches_BTF, self.config.out_channels, self.config.patch_size, grid)


class LabelEmbedder(nn.Module):
    """A vector per class, and in the last row one for the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor, dropped_B: Tensor | None) -> Tensor:
        """[B, D] of labels [B]; the null class where `dropped_B` is true."""
        # On a GPU the check would wait for the device; there the embedding's own assertion stops a wrong label.
        if labels.device.type == "cpu" and bool(((labels < 0) | (labels >= self.num_classes)).any()):
            raise ValueError(
                f"labels must be from 0 to {self.num_classes - 1}, not {int(labels.min())} to {int(labels.max())}"
            )
        if dropped_B is not None:
            labels = torch.where(dropped_B, self.num_classes, labels)
        return self.embedding_table(labels)


class Block(nn.Module):
    """Self-attention and MLP, each between a modulated layer norm and a gate that the condition sets."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = SelfAttention(width, config.head_dim)
        self.mlp = MLP(width, config.mlp_ratio * width, width, "gelu_tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Modulation(width, 6))

    def forward(self, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition_BD)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation
        x_BTD = torch.addcmul(x_BTD, gate_attention, self.attn(modulate(x_BTD, shift_attention, scale_attention)))
        return torch.addcmul(x_BTD, gate_mlp, self.mlp(modulate(x_BTD, shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """From tokens [B, T, D] to the features of their patches [B, T, F]."""

    def __init__(self, width: int, patch_features: int) -> None:
        super().__init__()
        self.linear = Readout(width, patch_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Modulation(width, 2))

    def forward(self, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_BD)
        return self.linear(modulate(x_BTD, shift, scale))


def forward_flops(config: DiTConfig, num_text_tokens: int) -> ForwardFlops:
    """What one sample takes, with attention as a product of all pairs of tokens.

    There is no text: `num_text_tokens` has no influence.
    """
    D, T, p = config.width, (config.input_size // config.patch_size) ** 2, config.patch_size
    block = T * (4 + 2 * config.mlp_ratio) * D * D + 2 * T * T * D + 6 * D * D
    attention = 4 * config.depth * T * T * D
    first_layers = T * config.in_channels * p * p * D + SINUSOID_CHANNELS * D
    final = 2 * D * D + T * D * config.out_channels * p * p
    return ForwardFlops((2 * block,) * config.depth, 2 * (first_layers + D * D + final), 2 * first_layers, attention)
