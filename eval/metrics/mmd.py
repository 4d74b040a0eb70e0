"""Maximum mean discrepancies: KID (arXiv 1801.01401) and CMMD (arXiv 2401.09603)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
KID_SEED = 2020  # torch-fidelity's: the same subsets are drawn there and here
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Discrepancy:
    """The squared discrepancy and its standard error, or None where there are too few images for one."""

    value: float
    stderr: float | None


def kid(
    features_ND: Tensor,
    reference_MD: Tensor,
    num_subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
) -> Discrepancy:
    """Kernel Inception distance: unbiased MMD^2 with the kernel (x . y / D + 1)^3, mean over subsets, float64.

    The standard error is the delete-d jackknife's, from how much the subsets differ; it covers both sets. Raises
    ValueError for fewer images than a subset has.
    """
    fewest = min(len(features_ND), len(reference_MD))
    if fewest < subset_size:
        raise ValueError(
            f"KID takes subsets of {subset_size} images; there are {len(features_ND)} and {len(reference_MD)}"
        )
    # NumPy keeps RandomState's streams as they are for ever.
    random = np.random.RandomState(KID_SEED)
    values = np.empty(num_subsets)
    for subset in range(num_subsets):
        x_SD, y_SD = (
            features[torch.from_numpy(random.choice(len(features), subset_size, replace=False))].double()
            for features in (features_ND, reference_MD)
        )
        values[subset] = _unbiased_cubic(x_SD, y_SD)
    if fewest == subset_size:
        return Discrepancy(float(values.mean()), None)
    return Discrepancy(float(values.mean()), float(values.std()) * (subset_size / (fewest - subset_size)) ** 0.5)


def _unbiased_cubic(x_SD: Tensor, y_SD: Tensor) -> float:
    size, dim = x_SD.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    within = sum(float(k.sum() - k.trace()) for k in (kernel(x_SD, x_SD), kernel(y_SD, y_SD)))
    return within / (size * (size - 1)) - 2 * kernel(x_SD, y_SD).mean().item()


def cmmd(features_ND: Tensor, reference_MD: Tensor) -> Discrepancy:
    """1000 times the biased MMD^2 of L2-normalised embeddings with the kernel exp(-|x - y|^2 / (2 * 10^2)).

    The kernel is between 0.98 and 1, so k - 1 is what is summed: the ones cancel, and with them float32's error. The
    standard error is the infinitesimal jackknife's, the reference taken as exact.
    """
    within_N, across_N = _mean_kernel(features_ND, features_ND), _mean_kernel(features_ND, reference_MD)
    value = within_N.mean() + _mean_kernel(reference_MD, reference_MD).mean() - 2 * across_N.mean()
    influence_N = 2 * (within_N - across_N)
    stderr = influence_N.std().item() / len(influence_N) ** 0.5 if len(influence_N) > 1 else None
    return Discrepancy(CMMD_SCALE * value.item(), None if stderr is None else CMMD_SCALE * stderr)


def _mean_kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """The mean of k(x, y) - 1 over y for each x, float64 [N]."""
    x_squares, y_squares = x_ND.square().sum(dim=1), y_MD.square().sum(dim=1)
    rows = []
    for x_BD, squares_B in zip(x_ND.split(BLOCK_ROWS), x_squares.split(BLOCK_ROWS), strict=True):
        total_B = torch.zeros(len(x_BD), dtype=torch.float64)
        for y_BD, y_squares_B in zip(y_MD.split(BLOCK_ROWS), y_squares.split(BLOCK_ROWS), strict=True):
            distances = (squares_B[:, None] + y_squares_B - 2 * (x_BD @ y_BD.T)).clip(0)
            total_B += (distances / (-2 * CMMD_SIGMA**2)).expm1().sum(dim=1, dtype=torch.float64)
        rows.append(total_B / len(y_MD))
    return torch.cat(rows)
