"""DiT as diffusers has it: DiTTransformer2DModel and DiTPipeline."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

from megadit.models.diffusers_format import (
    VAE,
    DiffusersFormat,
    Pair,
    Pipeline,
    attention_and_mlp,
    copy_to,
    linear,
    require_positions,
    the_same,
)
from megadit.models.dit.config import DiTConfig
from megadit.models.layers import NORM_EPS, fixed_positions

logger = logging.getLogger(__name__)


def peer(config: DiTConfig, sizes: dict[str, Any]) -> DiTTransformer2DModel:
    """It has `timestep_freq_shift` 1 whatever the config says; `use_published_timesteps` changes that."""
    return DiTTransformer2DModel(**sizes, num_embeds_ada_norm=config.num_classes, norm_eps=NORM_EPS)


def use_published_timesteps(transformer: DiTTransformer2DModel) -> None:
    """Give a DiT of diffusers the timestep features of the published code (`timestep_freq_shift` 0).

    diffusers has no setting for it, so this has to be done each time such a model has been loaded.
    """
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0


def pairs(config: DiTConfig) -> Iterator[Pair]:
    blocks = [f"transformer_blocks.{index}" for index in range(config.depth)]
    embedders = [f"{block}.norm1.emb" for block in blocks]  # diffusers keeps a copy in every block
    yield from linear("x_embedder.proj", "pos_embed.proj")
    for ours, theirs in (("mlp.0", "linear_1"), ("mlp.2", "linear_2")):
        for leaf in ("weight", "bias"):
            copies = [f"{embedder}.timestep_embedder.{theirs}.{leaf}" for embedder in embedders]
            yield Pair(f"t_embedder.{ours}.{leaf}", tuple(copies), copy_to(len(copies)), the_same)
    copies = [f"{embedder}.class_embedder.embedding_table.weight" for embedder in embedders]
    yield Pair("y_embedder.embedding_table.weight", tuple(copies), copy_to(len(copies)), the_same)
    for index, block in enumerate(blocks):
        yield from attention_and_mlp(f"blocks.{index}", block)
        yield from linear(f"blocks.{index}.adaLN_modulation.1", f"{block}.norm1.linear")
    yield from linear("final_layer.adaLN_modulation.1", "proj_out_1")
    yield from linear("final_layer.linear", "proj_out_2")


def _check(config: DiTConfig, weights: Mapping[str, Tensor], allow_mismatch: bool) -> None:
    if config.timestep_freq_shift == 0 and not allow_mismatch:
        raise ValueError(
            "DiTTransformer2DModel of diffusers has other timestep frequencies (10000^(-i/127)) than the published DiT "
            "(10000^(-i/128)), and no setting for it; train with model.timestep_freq_shift: 1, or export with "
            "--allow-timestep-mismatch and set downscale_freq_shift = 0 on every block's norm1.emb.time_proj after "
            "loading (megadit.models.dit.diffusers.use_published_timesteps)"
        )
    if config.num_classes != 1000:
        logger.warning("DiTPipeline guides by class 1000, which is the null class of a model with 1000 classes only")
    require_positions(weights, fixed_positions(config))


FORMAT = DiffusersFormat(
    peer=peer,
    pairs=pairs,
    # DiTPipeline drops the learned variance before it calls the scheduler.
    pipelines={
        "ddpm": Pipeline("DiTPipeline", lambda: DDIMScheduler(beta_schedule="linear", clip_sample=False), others=VAE)
    },
    arguments=lambda batch: {"class_labels": batch.labels},
    left_out=("pos_embed",),
    check=_check,
)
