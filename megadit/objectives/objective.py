"""What an objective is: what a network learns to predict, from which noisy pictures, and how far off it is.

An objective is a file here that says all of it: its part of the recipe, draws, losses by name, samplers, and what it
demands of a model. `megadit/objectives/__init__.py` registers it; nothing outside asks which objective a recipe has.
Another one, in a module of a user's, registers itself when it is imported (`imports:` of the recipe).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn

from megadit.batch import Batch
from megadit.models import ModelConfig
from megadit.node import FREE, STAGE, Fraction, Node, PositiveInt, identity

Predict = Callable[[Tensor, Tensor], Tensor]  # (x [B, C, H, W], timestep [], in [0, 1000]) -> prediction, fp32

SAME_LOSS = identity("what the model predicts follows from it")


class ObjectiveConfig(Node):
    """The `objective` section of a recipe: what all objectives share."""

    kind: Annotated[str, SAME_LOSS]
    condition_dropout: Annotated[Fraction, STAGE] = 0.1
    num_loss_bins: Annotated[PositiveInt, FREE] = 4  # timestep bins whose losses are logged on their own

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured. Sweeps and validation compare the first by default: one that no setting scales."""

    @abstractmethod
    def check_model(self, model: ModelConfig) -> None:
        """Raise ValueError unless the objective can train the model."""

    @property
    def needs_squares(self) -> str | None:
        """The key because of which pictures must be squares of one size; None where they need not."""
        return None

    @property
    def needs_features(self) -> str | None:
        """The key because of which samples need an image encoder's features; None where they need none."""
        return None

    @property
    def image_encoder(self) -> str | None:
        """The folder of a frozen image encoder that computes features in the trainer; None without one."""
        return None

    @property
    def paper_space(self) -> tuple[str, ...]:
        """Its own part of the search space `paper`, as KEY=VALUES."""
        return ()


@dataclass(frozen=True)
class Losses:
    """Of each sample of a batch, fp32 [B]."""

    total_B: Tensor  # what training minimises, a weighted sum
    by_metric: Mapping[str, Tensor]  # by the names of the settings' `metrics`; smaller is better

    def detach(self) -> "Losses":
        return Losses(self.total_B.detach(), {name: loss_B.detach() for name, loss_B in self.by_metric.items()})

    @staticmethod
    def cat(parts: "Sequence[Losses]") -> "Losses":
        """Those of several micro-batches in a row."""
        by_metric = {name: torch.cat([part.by_metric[name] for part in parts]) for name in parts[0].by_metric}
        return Losses(torch.cat([part.total_B for part in parts]), by_metric)

    def columns(self, names: Sequence[str]) -> Tensor:
        """The total and the named metrics side by side, float64 [B, 1 + len(names)], on the CPU."""
        return torch.stack([self.total_B, *(self.by_metric[name] for name in names)], dim=1).double().cpu()


class Objective(Protocol):
    """Timesteps are fp32 in [0, 1000], where 0 is the picture, as in diffusers' schedulers."""

    def timesteps(self, uniform_B: Tensor) -> Tensor:
        """Timesteps of the training distribution from uniform draws in [0, 1), in their order."""
        ...

    def timesteps_at(self, fraction_B: Tensor) -> Tensor:
        """Timesteps at fractions in [0, 1) of the time axis."""
        ...

    def losses(self, model: nn.Module, batch: Batch, timestep_B: Tensor) -> Losses:
        """The losses of each sample.

        The condition of a sample is dropped where its uniform draw is below the recipe's `condition_dropout`:
        classifier-free guidance (arXiv 2207.12598) needs the unconditional model too.
        """
        ...

    def targets(self, batch: Batch) -> Tensor:
        """What the network should predict, [B, C, H, W]."""
        ...


@dataclass(frozen=True)
class SamplerKind:
    """A way from noise to images [B, C, H, W] along a model's predictions."""

    run: Callable[..., Tensor]  # (Predict, noise [B, C, H, W], number of steps), and by name what it takes
    default_steps: int
    steps: tuple[int, float] = (1, math.inf)  # the fewest and the most that can be
    # "shift": of times to noise, a float. "draws": for each image a generator on the CPU, of the noise that it adds.
    takes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ObjectiveKind:
    """An objective that recipes can choose. Its name is the default of `config.kind`."""

    config: type[ObjectiveConfig]
    # Frozen encoders compute in the dtype. Raises ValueError where one that it needs cannot be loaded.
    build: Callable[[Any, ModelConfig, torch.device, torch.dtype], Objective]
    samplers: Mapping[str, SamplerKind]  # the default first

    @property
    def name(self) -> str:
        return str(self.config.model_fields["kind"].default)


def arguments(batch: Batch, model: ModelConfig, condition_dropout: float) -> dict[str, Tensor]:
    """Keyword arguments of the model: its conditions in a batch, and where they are dropped."""
    conditions = {name: getattr(batch, name) for name in model.conditions.columns}
    return conditions | {"dropped_B": batch.drop_uniform < condition_dropout}
