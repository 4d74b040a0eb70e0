"""The Frechet distance of two normal distributions (FID, arXiv 1706.08500), in float64 throughout.

|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The trace of the root is the sum of the roots of the eigenvalues of
S2^(1/2) S1 S2^(1/2), which is symmetric, so that rounding can make an eigenvalue negative but never complex; scipy's
sqrtm of S1 S2, which most tools use, changes with scipy's version. Statistics in float32 are off by up to 2.7.
"""

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from megadit.files import writing

BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] (divided by n - 1), float64. `num` is None where a file does not say."""

    mu: Tensor
    sigma: Tensor
    num: int | None


@dataclass
class Moments:
    """Number, mean [D] and sum of outer products about the mean [D, D] of vectors seen, float64; merged by Chan's rule.

    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    num: int
    mean: Tensor
    outer: Tensor

    @staticmethod
    def of(features_ND: Tensor) -> "Moments":
        """The moments of some vectors, in blocks: the same to the last bit, however they were computed."""
        assert features_ND.ndim == 2, f"vectors as rows, not {tuple(features_ND.shape)}"
        dim = features_ND.shape[1]
        total = Moments(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))
        for block in features_ND.split(BLOCK_ROWS):
            rows = block.double()
            mean = rows.mean(dim=0)
            centred = (rows - mean).numpy()
            # NumPy takes the product with its own transpose by BLAS's syrk: half the work of torch's.
            total = total.merge(Moments(len(rows), mean, torch.from_numpy(centred.T @ centred)))
        return total

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together."""
        num = self.num + other.num
        if num == 0:
            return self
        step = other.mean - self.mean
        outer = self.outer + other.outer + torch.outer(step, step) * (self.num * other.num / num)
        return Moments(num, self.mean + step * (other.num / num), outer)

    def statistics(self) -> Statistics:
        """Raises ValueError for fewer than two vectors."""
        if self.num < 2:
            raise ValueError(f"a covariance needs at least two images, not {self.num}")
        return Statistics(self.mean, self.outer / (self.num - 1), self.num)


@dataclass(frozen=True)
class Frechet:
    """The distance, and the transport map of the first distribution to the second, which its uncertainty needs."""

    value: float
    transport_DD: Tensor


def frechet(ours: Statistics, reference: Statistics) -> Frechet:
    """The Frechet distance. Raises ValueError where the two are of different features."""
    if ours.mu.shape != reference.mu.shape:
        raise ValueError(
            f"statistics of {len(ours.mu)} and of {len(reference.mu)} features cannot be compared: "
            "they are of different networks"
        )
    root = _root(reference.sigma)
    product = root @ ours.sigma @ root
    eigenvalues, vectors = torch.linalg.eigh((product + product.T) / 2)
    roots = eigenvalues.clip(0).sqrt()
    distance = (ours.mu - reference.mu).square().sum() + ours.sigma.trace() + reference.sigma.trace() - 2 * roots.sum()
    # Pseudo-inverse: directions in which ours has no variance carry no transport.
    inverse = torch.where(roots > roots[-1] * len(roots) * torch.finfo(roots.dtype).eps ** 0.5, 1 / roots, 0)
    half = root @ vectors
    return Frechet(distance.item(), (half * inverse) @ half.T)


def frechet_stderr(features_ND: Tensor, ours: Statistics, reference: Statistics, transport_DD: Tensor) -> float | None:
    """Standard error of the Frechet distance from the number of images of `features_ND`, the reference taken as exact.

    By the infinitesimal jackknife (Jaeckel 1972): the distance moves by 2 (mu1 - mu2) . d + d' (1 - T) d / n when a
    picture d away from the mean gets more weight, T the transport map. None where there are not more images than
    features: the covariance then has no full rank and the bias, which this leaves out, is the larger error anyway.
    """
    num, dim = features_ND.shape
    if num <= dim:
        return None
    map_DD = (torch.eye(dim, dtype=torch.float64) - transport_DD).float()  # float32 is enough for an error
    shift = 2 * (ours.mu - reference.mu).float()
    influence = []
    for block in features_ND.split(BLOCK_ROWS):
        centred = (block - ours.mu).float()
        influence.append(centred @ shift + ((centred @ map_DD) * centred).sum(dim=1))
    return torch.cat(influence).double().std().item() / num**0.5


def _root(sigma: Tensor) -> Tensor:
    """The symmetric root of a covariance; eigenvalues below zero are rounding."""
    eigenvalues, vectors = torch.linalg.eigh(sigma)
    return (vectors * eigenvalues.clip(0).sqrt()) @ vectors.T


def save_statistics(path: Path, statistics: Statistics, features: str, suffix: str) -> None:
    """Write an .npz as pytorch-fid's and ADM's: mu, sigma (mu_s, sigma_s for `suffix` "_s"), and n and features."""
    arrays = {f"mu{suffix}": statistics.mu.numpy(), f"sigma{suffix}": statistics.sigma.numpy()}
    with writing(path) as file:
        np.savez(file, allow_pickle=False, n=np.array(statistics.num), features=np.array(features), **arrays)


def load_statistics(path: Path, features: str, suffix: str, dim: int) -> Statistics:
    """Read mu and sigma of an .npz. Raises ValueError for a file without them, of other features or another size."""
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files if name != "arr_0"}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"statistics {path} cannot be read: {error}") from error
    names = f"mu{suffix}", f"sigma{suffix}"
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"statistics {path}: no {' and '.join(missing)} in it, but {', '.join(sorted(found))}")
    if "features" in found and str(found["features"]) != features:
        raise ValueError(f"statistics {path} are of {found['features']}, not of {features}")
    mu, sigma = (torch.from_numpy(np.asarray(found[name], dtype=np.float64)) for name in names)
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise ValueError(
            f"statistics {path}: {names[0]} {tuple(mu.shape)} and {names[1]} {tuple(sigma.shape)}, "
            f"where {features} has {dim} features"
        )
    if not bool(mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"statistics {path}: not all numbers are finite")
    return Statistics(mu, sigma, int(found["n"]) if "n" in found else None)
