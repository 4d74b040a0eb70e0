"""What engines do to the blocks of a model before they shard them: activation checkpointing and compilation.

Both replace `block.forward` on the instance. Names of parameters stay, and the hooks that gather and free a block's
weights stay outside.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megadit.parametrization.spec import ParamSpec
from megadit.recipe.schema import Engine as EngineSettings

# What selective checkpointing keeps: nearly all of the arithmetic, and little of the memory.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def prepare_blocks(model: nn.Module, settings: EngineSettings) -> None:
    """Checkpoint and compile the blocks of `model` as the recipe says."""
    level = settings.activation_checkpointing
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        if level == "selective":
            block.forward = _checkpointed(block.forward, context_fn=_keep_products)
        elif is_checkpointed(level, index):
            block.forward = _checkpointed(block.forward)
        if settings.compile:
            # fullgraph: too many shapes are an error then, not a silent return to eager mode. The second length of
            # captions makes lengths symbolic, so there are few.
            block.forward = torch.compile(block.forward, fullgraph=True)


def is_checkpointed(level: str | int, index: int) -> bool:
    """Whether engine.activation_checkpointing `level` makes the block at `index` compute all of itself again."""
    return level == "full" or (isinstance(level, int) and index % level == 0)


def num_parameters_of_blocks(specs: Iterable[ParamSpec]) -> dict[str, int]:
    """Name of a block ("blocks.0") -> number of its parameters; "" is what belongs to no block."""
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[block_of(spec.name)] += math.prod(spec.shape)
    return dict(sizes)


def block_of(name: str) -> str:
    """The block of a parameter of this name, such as "blocks.0"; "" where it belongs to none."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else ""


def _checkpointed(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`forward`, whose activations are computed again in the backward pass. Blocks draw no random numbers."""
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
