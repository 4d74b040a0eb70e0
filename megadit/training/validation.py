"""The validation losses: of a fixed set of (sample, timestep, noise) triples, so that two numbers can be compared.

Every held-out sample is scored at every timestep (k + 1/2) / T, each with its own fixed noise; captions are never
dropped. Evenly spaced timesteps make the number far less noisy than drawn ones (Stable Diffusion 3 found such a loss
to go with sample quality, arXiv 2403.03206, section 5.3). Sums are in float64 over all ranks: the result does not
depend on how many there are.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megadit.data.loading.loader import validation_batches
from megadit.distributed import Topology
from megadit.engines.base import Engine
from megadit.objectives import Objective
from megadit.recipe import Recipe
from megadit.training.online import OnlineEncoders, stream_draws_noise


@dataclass(frozen=True)
class ValidationLoss:
    """Of the objective's first metric, which no setting scales; the others and the weighted sum beside it."""

    metric: str
    loss: float
    loss_strata: list[float]  # by timestep, from image to noise
    constant_loss: float  # of the best constant prediction: the variance of the targets over the set
    total: float  # what training minimises
    others: Mapping[str, float]  # by metric


def validate(
    engine: Engine, objective: Objective, recipe: Recipe, encoders: OnlineEncoders | None = None
) -> ValidationLoss:
    """Score the engine's present weights on the whole validation set."""
    settings = recipe.validation
    assert settings is not None and recipe.data.validation_url is not None
    strata, metrics = settings.num_timesteps, recipe.objective.metrics
    sums = torch.zeros(strata, 2 + len(metrics), dtype=torch.float64)  # count, total, metrics
    moments = _Moments(engine.topology)
    axis = engine.topology.data
    for batch, weight_B in validation_batches(
        recipe.data,
        recipe.seed,
        axis.rank,
        axis.size,
        settings.batch_size,
        strata,
        stream_draws_noise(recipe),
        recipe.objective.needs_features is not None,
    ):
        fraction_B = batch.timestep_uniform
        on_device = batch.to(engine.device) if encoders is None else encoders.encode_validation(batch)
        timestep_B = objective.timesteps_at(on_device.timestep_uniform)
        closure = partial(objective.losses, batch=on_device, timestep_B=timestep_B)
        loss_BM = engine.evaluate(closure).columns(metrics)
        weight_B1 = weight_B.double()[:, None]
        sums.index_add_(0, (fraction_B * strata).long(), torch.cat([weight_B1, loss_BM * weight_B1], dim=1))
        moments.add(objective.targets(on_device).cpu().double(), weight_B.double())
    engine.topology.sum(sums)
    count, *means = sums.sum(0).tolist()
    total, loss, *others = (value / count for value in means)
    return ValidationLoss(
        metric=metrics[0],
        loss=loss,
        loss_strata=(sums[:, 2] / sums[:, 0]).tolist(),
        constant_loss=moments.variance(),
        total=total,
        others=dict(zip(metrics[1:], others, strict=True)),
    )


class _Moments:
    """Of the targets: per element of an image, for each resolution."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._count: defaultdict[torch.Size, float] = defaultdict(float)
        self._sums: dict[torch.Size, Tensor] = {}  # [2, C, H, W]: of values and of squares

    def add(self, target_BCHW: Tensor, weight_B: Tensor) -> None:
        shape, weights = target_BCHW.shape[1:], weight_B.view(-1, 1, 1, 1)
        self._count[shape] += weight_B.sum().item()
        sums = torch.stack([(target_BCHW * weights).sum(0), (target_BCHW.square() * weights).sum(0)])
        self._sums[shape] = self._sums.get(shape, torch.zeros_like(sums)) + sums

    def variance(self) -> float:
        """The mean over all samples of all ranks; all ranks call this together."""
        total, weighted = 0.0, 0.0
        for shape in sorted(set().union(*self._topology.on_every(lambda: set(self._sums)))):
            sums = self._topology.sum(self._sums.get(shape, torch.zeros(2, *shape, dtype=torch.float64)))
            count = self._topology.sum(torch.tensor(float(self._count[shape]), dtype=torch.float64)).item()
            mean, mean_square = sums / count
            weighted += count * (mean_square - mean.square()).mean().item()
            total += count
        return weighted / total
