"""The validation loss: a fixed set of (sample, timestep, noise) triples, so that two numbers can be compared.

Every held-out sample is scored at every timestep (k + 1/2) / T, each with its own fixed noise; captions are never
dropped. Evenly spaced timesteps make the number far less noisy than drawn ones (Stable Diffusion 3 found such a loss
to go with sample quality, arXiv 2403.03206, section 5.3). Sums are in float64 over all ranks: the result does not
depend on how many there are.
"""

from dataclasses import dataclass
from functools import partial

import torch

from megadit.data.stream import validation_batches
from megadit.engines.base import Engine, sum_over_ranks
from megadit.objectives import Objective
from megadit.recipe import Recipe
from megadit.training.ranks import rank, world_size


@dataclass(frozen=True)
class ValidationLoss:
    loss: float
    loss_strata: list[float]  # by timestep, from image to noise
    constant_loss: float  # of the best constant prediction: the variance of the targets over the set


def validate(engine: Engine, objective: Objective, recipe: Recipe) -> ValidationLoss:
    """Score the engine's present weights on the whole validation set."""
    settings = recipe.validation
    assert settings is not None and recipe.data.validation_url is not None
    strata = settings.num_timesteps
    sums = torch.zeros(strata, 2, dtype=torch.float64)  # loss, count
    first = second = torch.zeros((), dtype=torch.float64)  # moments of the targets, per element of an image
    for batch, weight_B in validation_batches(
        recipe.data.validation_url, recipe.seed, rank(), world_size(), settings.batch_size, strata
    ):
        fraction_B, on_device = batch.timestep_uniform, batch.to(engine.device)
        timestep_B = objective.timesteps_at(on_device.timestep_uniform)
        closure = partial(objective.losses, batch=on_device, timestep_B=timestep_B)
        loss_B = engine.evaluate(closure).double().cpu()
        stratum_B = (fraction_B * strata).long()
        sums[:, 0].index_add_(0, stratum_B, loss_B * weight_B)
        sums[:, 1].index_add_(0, stratum_B, weight_B.double())
        target = objective.targets(batch).double() * weight_B.double().view(-1, 1, 1, 1)
        first = first + target.sum(0)
        second = second + target.square().sum(0)
    counts = sum_over_ranks(sums)[:, 1].sum()
    mean, mean_square = sum_over_ranks(first) / counts, sum_over_ranks(second) / counts
    return ValidationLoss(
        loss=(sums[:, 0].sum() / counts).item(),
        loss_strata=(sums[:, 0] / sums[:, 1]).tolist(),
        constant_loss=(mean_square - mean.square()).mean().item(),
    )
