"""Inception score (arXiv 1606.03498): exp of the mean divergence of p(class | image) from p(class), over splits."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

NUM_SPLITS = 10
SHUFFLE_SEED = 2020  # torch-fidelity's: the same images share a split there and here


@dataclass(frozen=True)
class InceptionScore:
    """The mean over splits, their standard deviation (what papers print after +-), and the mean's standard error."""

    value: float
    std: float
    stderr: float


def inception_score(logits_NC: Tensor, num_splits: int = NUM_SPLITS) -> InceptionScore:
    """The score of logits without bias, float64 inside. 50,000 images make splits of 5,000, as in ADM's evaluator.

    Images are shuffled first: those of a folder are sorted by class, and a split of a tenth of the classes would score
    far too low. Raises ValueError for fewer than two images a split.
    """
    num = len(logits_NC)
    if num < 2 * num_splits:
        raise ValueError(
            f"an Inception score over {num_splits} splits needs at least {2 * num_splits} images, not {num}"
        )
    # NumPy keeps RandomState's streams as they are for ever.
    order = np.random.RandomState(SHUFFLE_SEED).permutation(num)
    log_p_NC = logits_NC[torch.from_numpy(order)].double().log_softmax(dim=1)
    bounds = [split * num // num_splits for split in range(num_splits + 1)]
    scores = np.array([_score(log_p_NC[start:end]) for start, end in pairwise(bounds)])
    std = float(scores.std())
    return InceptionScore(float(scores.mean()), std, std / (num_splits - 1) ** 0.5)


def _score(log_p_NC: Tensor) -> float:
    p_NC = log_p_NC.exp()
    divergence_N = (p_NC * (log_p_NC - p_NC.mean(dim=0).log())).sum(dim=1)
    return divergence_N.mean().exp().item()
