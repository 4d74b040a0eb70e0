"""FLOPs and tokens of training, by formula: of matrix products and attention, whose order everything else is below.

Model FLOPs are what the mathematics asks for, whatever an engine computes again; the utilisation of a GPU is by them.
Computed are those of a step as it runs, with what checkpointed blocks compute again.

The backward pass counts two products for each of the forward pass, attention included, but for the layers that no
gradient goes through: one. (Kernels of attention compute the scores again there, and torch's FlopCounterMode counts
2.5 times their forward pass for it.)
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megadit.engines.blocks import is_checkpointed
from megadit.models import ModelConfig, forward_flops
from megadit.recipe import Recipe

PASSES = 3  # of a training step, in units of the forward pass


@dataclass(frozen=True)
class StepFlops:
    """Of one rank in one optimizer step."""

    model: int
    computed: int  # with what is computed again


def training_flops(config: ModelConfig, text_lengths: Iterable[int]) -> int:
    """Model FLOPs to train once on samples with captions of `text_lengths` tokens, without padding."""
    forward = [forward_flops(config, length) for length in text_lengths]
    return sum(PASSES * sample.total - sample.first_layers for sample in forward)


def step_flops(recipe: Recipe, num_ranks: int, text_tokens: int) -> StepFlops:
    """Of a step with captions of `text_tokens` tokens, padding included; online encoders are not counted.

    A block that is checkpointed whole has its forward pass twice. Selective checkpointing keeps what products give.
    """
    num_samples = recipe.training.batch_size // num_ranks
    model = training_flops(recipe.model, [text_tokens])
    blocks = forward_flops(recipe.model, text_tokens).blocks
    level = recipe.engine.activation_checkpointing
    again = sum(flops for index, flops in enumerate(blocks) if is_checkpointed(level, index))
    return StepFlops(num_samples * model, num_samples * (model + again))


def training_tokens(config: ModelConfig, text_lengths: Iterable[int]) -> int:
    """Tokens of the samples: patches, and those of text where the model takes it."""
    takes_text = config.conditions.text_dim is not None
    return sum(config.num_patches + (length if takes_text else 0) for length in text_lengths)
