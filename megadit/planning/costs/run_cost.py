"""What a whole run costs: time, money, what it reads, what it saves, and what failures take."""

import math
from dataclasses import dataclass

from megadit import optimizers
from megadit.planning.machine.assumptions import Assumptions
from megadit.planning.machine.gpus import GB
from megadit.recipe import Recipe

FP32_BYTES = 4
HOUR, DAY = 3600.0, 86_400.0


@dataclass(frozen=True)
class Reading:
    """From the object store, while training."""

    bytes_per_image: float
    gb_per_second: float
    requests_per_second: float


@dataclass(frozen=True)
class Saving:
    """Checkpoints and failures. Young's interval (1974) loses least."""

    num_bytes: int
    stall_seconds: float  # of each, for which training stands still
    write_seconds: float  # beside training
    interval_seconds: float  # of the recipe
    best_interval_seconds: float
    failure_hours: float  # between two
    goodput: float  # the share of time that makes steps which last

    @property
    def num_failures_per_day(self) -> float:
        return 24 / self.failure_hours


def reading(recipe: Recipe, images_per_second: float, assumed: Assumptions) -> Reading:
    """Latents as mean and std where there are more than 3 channels, pixels else; text and features as assumed."""
    model = recipe.model
    taken = model.conditions
    elements = model.in_channels * model.input_size**2
    picture = elements if model.in_channels == 3 else 2 * elements * assumed.latent_bytes
    text = (taken.text_dim or 0) * assumed.text_tokens * assumed.text_bytes + 2 * (taken.pooled_dim or 0)
    stored = 0 if recipe.objective.image_encoder else model.feature_dim or 0
    features = model.num_patches * stored * assumed.feature_bytes
    size = picture + text + features
    requests = images_per_second / recipe.data.chunk_samples
    return Reading(size, images_per_second * size / GB, requests)


def saving(
    recipe: Recipe, num_parameters: int, num_gpus: int, images_per_second: float, assumed: Assumptions
) -> Saving:
    """Of the recipe's checkpoints, on so many GPUs."""
    training, settings = recipe.training, recipe.checkpoints
    num_averages = len(training.ema_rates) + len(training.ema_power_stds)
    copies = 1 + len(optimizers.kind_of(recipe.optimizer).slots) + num_averages
    num_bytes = FP32_BYTES * num_parameters * copies
    write = num_bytes / GB / assumed.storage_gb_per_second
    copied = num_bytes / GB / num_gpus / assumed.staging_gb_per_second
    stall = copied if settings.asynchronous else copied + write
    failure = HOUR * assumed.gpu_hours_per_failure / num_gpus
    interval = settings.every_images / images_per_second
    best = max(write, math.sqrt(2 * max(stall, 1e-3) * failure))
    restart = 60 * assumed.restart_minutes
    lost = stall / interval + (interval / 2 + restart) / failure
    return Saving(num_bytes, stall, write, interval, best, failure / HOUR, max(0.0, 1 - lost))
