"""From step results to the numbers that a person reads: the start-up block, the loss by timestep, the speed."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megadit import kernels
from megadit.distributed import Topology
from megadit.engines.base import StepResult
from megadit.kernels import attention
from megadit.models import family_of, num_flops
from megadit.parametrization.spec import ParamSpec
from megadit.parametrization.table import build_table
from megadit.planning.ceilings import device_name, peak_flops
from megadit.recipe import Recipe, Stage
from megadit.training.metrics import Metrics
from megadit.training.skipped import SkippedSteps
from megadit.training.telemetry import PHASES, Costs, Telemetry
from megadit.training.validation import ValidationLoss


def banner(stage: Stage, specs: Sequence[ParamSpec], num_samples: int, topology: Topology) -> str:
    """What is about to run, in a few lines."""
    recipe = stage.recipe
    num_parameters = Counter[str]()
    for spec in specs:
        num_parameters[spec.role] += torch.Size(spec.shape).numel()
    roles = ", ".join(f"{role} {count:,}" for role, count in num_parameters.most_common())
    epochs = recipe.training.num_images / num_samples
    name = recipe.name if stage.num_stages == 1 else f"{recipe.name}, {stage}"
    ours = kernels.in_use(family_of(recipe.model).kernels, topology.device.type, recipe.engine.compile)
    return "\n".join(
        [
            f"{name}: {recipe.model.family} of width {recipe.model.width}, {recipe.parametrization.kind}, "
            f"{sum(num_parameters.values()):,} parameters ({roles}); a forward pass takes "
            f"{num_flops(recipe.model, 0) / 1e9:.3g} GFLOP per image and "
            f"{(num_flops(recipe.model, 1) - num_flops(recipe.model, 0)) / 1e9:.3g} per text token",
            f"engine {_describe_engine(recipe, topology)}",
            f"{_describe_device(recipe, topology)}, {_describe_precision(recipe, topology)} matrix products, "
            f"attention: {attention.describe()}, kernels of ours: {', '.join(ours) or 'none'}",
            f"data {recipe.data.url}: {num_samples:,} samples; {recipe.training.num_images:,} images to train "
            f"({epochs:.1f} epochs) in {recipe.num_steps:,} steps of {recipe.training.batch_size}",
        ]
    )


def _describe_engine(recipe: Recipe, topology: Topology) -> str:
    settings = recipe.engine
    mesh = f"{topology.size} rank(s)"
    if topology.replicate.size > 1:
        mesh += f" as {topology.replicate.size} replicas x {topology.shard.size} shards"
    samples = recipe.training.batch_size // topology.size
    micro = recipe.training.micro_batch_size or samples
    parts = [
        f"{settings.kind} on {mesh}",
        f"{samples // micro} micro-batch(es) of {micro} on each",
        f"activation checkpointing {settings.activation_checkpointing}",
        f"CPU offload {settings.cpu_offload}",
        "blocks compiled" if settings.compile else "not compiled",
    ]
    return ", ".join(parts)


def _describe_precision(recipe: Recipe, topology: Topology) -> str:
    precision = recipe.training.precision
    return "fp32 (tf32 is for GPUs)" if precision == "tf32" and topology.device.type == "cpu" else precision


def _describe_device(recipe: Recipe, topology: Topology) -> str:
    name = device_name(topology.device)
    peak = peak_flops(name, recipe.training.precision)
    return f"{name} ({f'{peak / 1e12:g} TFLOP/s at most' if peak else 'peak unknown: MFU n/a'})"


class Reporter:
    """Collects what every rank saw; rank 0 writes it down. All methods are called by all ranks together."""

    def __init__(self, stage: Stage, run: Path, images_seen: int, telemetry: Telemetry, topology: Topology) -> None:
        self._stage, self._recipe = stage, stage.recipe
        recipe = stage.recipe
        self._telemetry = telemetry
        self._topology = topology
        self._names = recipe.objective.metrics
        self._roles = [spec.role for spec in build_table(recipe)]
        self._metrics = Metrics(run, images_seen, stage) if topology.is_first else None
        self._log_images = recipe.training.log_every_steps * recipe.training.batch_size
        self._num_replaced = 0  # since this process began, as the skipped steps
        self._start_interval()

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

    def step(
        self, images_seen: int, timestep_B: Tensor, result: StepResult, lr_factor: float, skipped: SkippedSteps
    ) -> None:
        """Take in one step of this rank; write a line when one is due."""
        if result.skipped:
            self._say_skipped(images_seen, result, skipped)
        else:
            num_bins, loss_BM = len(self._bins), result.losses.columns(self._names)
            bin_B = (timestep_B / 1000 * num_bins).long().clamp(max=num_bins - 1)
            self._bins.index_add_(0, bin_B, torch.cat([loss_BM.new_ones(len(loss_BM), 1), loss_BM], dim=1))
        if (images_seen - self._stage.first_image) % self._log_images and images_seen < self._stage.last_image:
            return
        sums, costs = self._topology.sum(self._bins), self._telemetry.take()
        self._count_replaced(images_seen, costs.num_replaced)
        if self._metrics and sums[:, 0].any():  # else every step was skipped, as has been said
            self._say_progress(images_seen, sums, costs, result, lr_factor, skipped.total)
        self._start_interval()

    def _say_progress(
        self, images_seen: int, sums: Tensor, costs: Costs, result: StepResult, lr_factor: float, num_skipped: int
    ) -> None:
        assert self._metrics
        images, *means = sums.sum(0).tolist()
        loss, *by_metric = (value / images for value in means)
        speed = f"{costs.images_per_second:.0f} images/s"
        if costs.mfu is not None:
            speed += f"  MFU {costs.mfu:.0%}"
        self._metrics.progress(images_seen, f"loss {loss:.4f}  {speed}")
        self._metrics.log(
            "train",
            images_seen,
            f"{images_seen} images  loss {loss:.4f}  {speed}  grad norm {result.grad_norm:.3g}",
            step=self._stage.steps(images_seen),
            loss=loss,
            **dict(zip(self._names, by_metric, strict=True)),
            loss_bins=[total / count if count else None for count, total in sums[:, :2].tolist()],
            grad_norm=None if result.skipped else result.grad_norm,
            **({} if result.skipped else self._norms_by_role(result.grad_norms_P)),
            lr=self._recipe.optimizer.lr * lr_factor,
            images_per_second=costs.images_per_second,
            tokens_per_second=costs.tokens_per_second,
            mfu=costs.mfu,
            **{f"{phase}_seconds": costs.seconds[phase] for phase in PHASES},
            data_stalls=costs.data_stalls,
            peak_gib=costs.peak_bytes / 2**30,
            skipped_steps=num_skipped,
            replaced_samples=self._num_replaced,
        )

    def _count_replaced(self, images_seen: int, num_replaced: int) -> None:
        """Which ones, and what is wrong with them, is in the log of the rank that read them."""
        self._num_replaced += num_replaced
        if num_replaced:
            self.say(
                f"{images_seen} images  {num_replaced} corrupt samples were replaced by others "
                f"({self._num_replaced} since the start)"
            )

    def _norms_by_role(self, grad_norms_P: Tensor) -> dict[str, float]:
        squares = dict.fromkeys(self._roles, 0.0)
        for role, norm in zip(self._roles, grad_norms_P.tolist(), strict=True):
            squares[role] += norm * norm
        return {f"grad_norm_{role}": math.sqrt(square) for role, square in squares.items()}

    def _say_skipped(self, images_seen: int, result: StepResult, skipped: SkippedSteps) -> None:
        if self._metrics:
            self._metrics.log(
                "skipped",
                images_seen,
                f"{images_seen} images  step skipped: the gradient norm is {result.grad_norm} "
                f"({skipped.in_a_row} in a row, {skipped.total} in all)",
                step=self._stage.steps(images_seen),
                grad_norm=str(result.grad_norm),
                in_a_row=skipped.in_a_row,
                skipped_steps=skipped.total,
            )

    def validation(self, images_seen: int, weights: str, result: ValidationLoss) -> None:
        if self._metrics:
            self._metrics.log(
                "validation",
                images_seen,
                f"{images_seen} images  validation {result.metric} {result.loss:.4f} ({weights}; "
                f"best constant prediction {result.constant_loss:.4f})",
                weights=weights,
                metric=result.metric,
                loss=result.loss,
                loss_strata=result.loss_strata,
                constant_loss=result.constant_loss,
                total=result.total,
                **result.others,
            )

    def _start_interval(self) -> None:
        self._bins = torch.zeros(self._recipe.objective.num_loss_bins, 2 + len(self._names), dtype=torch.float64)
