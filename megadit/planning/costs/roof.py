"""The roof of compute: how long a GPU takes at best for matrix products, attention, and what memory bounds.

Figures of FlashAttention 3 on an H100 (arXiv 2407.08608, figures 5 and 6), as shares of what large products sustain:
narrow matrices and short sequences reach less. Runs reach a share of the roof, `Assumptions.compute_share`, which is
fitted to published runs (published_runs.py, docs/planning.md).
"""

import math
from dataclasses import dataclass

from megadit.engines.blocks import is_checkpointed
from megadit.models import forward_flops
from megadit.planning.flops import PASSES, training_flops, training_tokens
from megadit.planning.machine.gpus import GB, Gpu
from megadit.recipe import Recipe

# Bytes that norms, modulations, gates and activations move for a token in a block, in units of its width in bytes: the
# forward pass, the backward pass.
MOVED_COMPILED, MOVED_EAGER = (52, 92), (104, 190)
ATTENTION_SHARES = {64: 0.725, 96: 0.81, 128: 0.90}  # of what products sustain, by head size, for long sequences
HALF_LENGTH = 390  # tokens at which attention reaches half of that
HALF_WIDTH = 200  # and matrix products
OPTIMIZER_BYTES, AVERAGE_BYTES = 34, 12  # a parameter: AdamW with the cast to bf16 (28 + 6), and each average


@dataclass(frozen=True)
class Work:
    """What one GPU does for a while."""

    linear_flops: float
    attention_flops: float
    width: int
    head_dim: int
    sequence_length: int
    moved_bytes: float  # by what memory bounds
    precision: str

    def seconds(self, gpu: Gpu) -> float:
        """At best."""
        peak = 1e12 * gpu.tflops[self.precision] * gpu.sustained_share
        linear = self.linear_flops / (peak * self.width / (self.width + HALF_WIDTH))
        attention = self.attention_flops / (peak * attention_share(self.head_dim, self.sequence_length))
        return linear + attention + self.moved_bytes / (GB * gpu.memory_gb_per_second)


def attention_share(head_dim: int, sequence_length: int) -> float:
    """Of what products sustain; heads are padded to 64, 96, 128 or a multiple, and padding is computed for nothing."""
    padded = next((size for size in ATTENTION_SHARES if head_dim <= size), 128 * math.ceil(head_dim / 128))
    share = ATTENTION_SHARES.get(padded, ATTENTION_SHARES[128])
    return share * head_dim / padded * sequence_length / (sequence_length + HALF_LENGTH)


def moved_bytes(
    num_tokens: float, num_blocks: float, width: int, precision: str, compiled: bool, again: float
) -> float:
    """By what memory bounds in a training step; `again` is the share of blocks that are computed again."""
    forward, backward = MOVED_COMPILED if compiled else MOVED_EAGER
    of_two_bytes = 1 if precision == "bf16" else 2
    return num_tokens * num_blocks * width * of_two_bytes * (forward * (1 + again) + backward)


def micro_batch_work(recipe: Recipe, num_samples: int, text_tokens: int) -> Work:
    """The forward and backward pass of one micro-batch, with what checkpointing computes again."""
    model, engine = recipe.model, recipe.engine
    forward = forward_flops(model, text_tokens)
    level, num_blocks = engine.activation_checkpointing, len(forward.blocks)
    again = sum(is_checkpointed(level, index) for index in range(num_blocks)) / num_blocks
    flops = training_flops(model, [text_tokens]) + again * sum(forward.blocks)
    attention = (PASSES + again) * forward.attention
    moved_again = 1.0 if level == "selective" else again  # which keeps products, and computes the rest again
    tokens = num_samples * training_tokens(model, [text_tokens])
    return Work(
        linear_flops=num_samples * (flops - attention),
        attention_flops=num_samples * attention,
        width=model.width,
        head_dim=model.head_dim,
        sequence_length=model.num_patches,
        moved_bytes=moved_bytes(
            tokens, num_blocks, model.width, recipe.training.precision, engine.compile, moved_again
        ),
        precision=recipe.training.precision,
    )


def optimizer_seconds(recipe: Recipe, num_parameters: float, gpu: Gpu) -> float:
    """Of the update of a rank's share of the parameters, and of its averages."""
    num_averages = len(recipe.training.ema_rates) + len(recipe.training.ema_power_stds)
    moved = num_parameters * (OPTIMIZER_BYTES + AVERAGE_BYTES * num_averages)
    return moved / (GB * gpu.memory_gb_per_second)
