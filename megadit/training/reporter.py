"""From step results to the numbers that a person reads: the start-up block, the loss by timestep, the speed."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megadit.engines.base import sum_over_ranks
from megadit.kernels import attention
from megadit.models import num_flops
from megadit.parametrization.spec import ParamSpec
from megadit.recipe import Recipe
from megadit.training.metrics import Metrics
from megadit.training.ranks import rank
from megadit.training.validation import ValidationLoss


def banner(recipe: Recipe, specs: Sequence[ParamSpec], num_samples: int, num_ranks: int) -> str:
    """What is about to run, in a few lines."""
    num_parameters = Counter[str]()
    for spec in specs:
        num_parameters[spec.role] += torch.Size(spec.shape).numel()
    roles = ", ".join(f"{role} {count:,}" for role, count in num_parameters.most_common())
    epochs = recipe.training.num_images / num_samples
    return "\n".join(
        [
            f"{recipe.name}: {recipe.model.family} of width {recipe.model.width}, {recipe.parametrization.kind}, "
            f"{sum(num_parameters.values()):,} parameters ({roles}); a forward pass takes "
            f"{num_flops(recipe.model, 0) / 1e9:.3g} GFLOP per image and "
            f"{(num_flops(recipe.model, 1) - num_flops(recipe.model, 0)) / 1e9:.3g} per text token",
            f"engine {recipe.engine.kind}, {num_ranks} rank(s), {recipe.training.precision} matrix products, "
            f"attention: {attention.describe()}",
            f"data {recipe.data.url}: {num_samples:,} samples; {recipe.training.num_images:,} images to train "
            f"({epochs:.1f} epochs) in {recipe.num_steps:,} steps of {recipe.training.batch_size}",
        ]
    )


class Reporter:
    """Collects what every rank saw; rank 0 writes it down. All methods are called by all ranks together."""

    def __init__(self, recipe: Recipe, run: Path, images_seen: int) -> None:
        self._recipe = recipe
        self._metrics = Metrics(run, images_seen, recipe.training.num_images) if rank() == 0 else None
        self._log_images = recipe.training.log_every_steps * recipe.training.batch_size
        self._start_interval(images_seen)

    def __enter__(self) -> "Reporter":
        if self._metrics:
            self._metrics.__enter__()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._metrics:
            self._metrics.__exit__(*error)

    def say(self, text: str) -> None:
        if self._metrics:
            self._metrics.say(text)

    def step(self, images_seen: int, timestep_B: Tensor, loss_B: Tensor, grad_norm: float, lr_factor: float) -> None:
        """Take in one step of this rank; write a line when one is due."""
        num_bins = len(self._bins)
        bin_B = (timestep_B / 1000 * num_bins).long().clamp(max=num_bins - 1)
        self._bins.index_add_(0, bin_B, torch.stack([loss_B.double(), torch.ones_like(loss_B.double())], dim=1))
        if images_seen % self._log_images and images_seen < self._recipe.training.num_images:
            return
        sums = sum_over_ranks(self._bins)
        seconds = time.perf_counter() - self._interval_started
        if self._metrics:
            loss, images = sums.sum(0).tolist()
            rate = images / seconds
            lr = self._recipe.optimizer.lr * lr_factor
            self._metrics.progress(images_seen, f"loss {loss / images:.4f}  {rate:.0f} images/s")
            self._metrics.log(
                "train",
                images_seen,
                f"{images_seen} images  loss {loss / images:.4f}  {rate:.0f} images/s  grad norm {grad_norm:.3g}",
                step=images_seen // self._recipe.training.batch_size,
                loss=loss / images,
                loss_bins=[total / count if count else None for total, count in sums.tolist()],
                grad_norm=grad_norm,
                lr=lr,
                images_per_second=rate,
            )
        self._start_interval(images_seen)

    def validation(self, images_seen: int, weights: str, result: ValidationLoss) -> None:
        if self._metrics:
            self._metrics.log(
                "validation",
                images_seen,
                f"{images_seen} images  validation loss {result.loss:.4f} ({weights}; "
                f"best constant prediction {result.constant_loss:.4f})",
                weights=weights,
                loss=result.loss,
                loss_strata=result.loss_strata,
                constant_loss=result.constant_loss,
            )
        self._interval_started = time.perf_counter()  # validation is not training time

    def _start_interval(self, images_seen: int) -> None:
        self._bins = torch.zeros(self._recipe.objective.num_loss_bins, 2, dtype=torch.float64)
        self._interval_started = time.perf_counter()
