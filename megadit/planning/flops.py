"""Model FLOPs and tokens of training: what the mathematics asks for, whatever an engine computes again."""

from collections.abc import Iterable

from megadit.models import ModelConfig, num_flops

PASSES = 3  # of a training step, in units of the forward pass: the backward pass has two products for each of its one


def training_flops(config: ModelConfig, text_lengths: Iterable[int]) -> int:
    """Floating-point operations to train once on samples with captions of `text_lengths` tokens, without padding."""
    return PASSES * sum(num_flops(config, length) for length in text_lengths)


def training_tokens(config: ModelConfig, text_lengths: Iterable[int]) -> int:
    """Tokens of the samples: patches, and those of text where the model takes it."""
    takes_text = config.conditions.text_dim is not None
    return sum(config.num_patches + (length if takes_text else 0) for length in text_lengths)
