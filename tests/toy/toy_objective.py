"""An objective from outside of the package: predict the picture from a mixture of it and noise, and its blur."""

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from megadit.batch import Batch
from megadit.models import ModelConfig
from megadit.objectives import OBJECTIVES
from megadit.objectives.objective import Losses, ObjectiveConfig, ObjectiveKind, Predict, SamplerKind, arguments


class ToyObjectiveConfig(ObjectiveConfig):
    kind: Literal["toy_picture"] = "toy_picture"
    blur_weight: Annotated[float, Field(ge=0)] = 0.5

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("picture", "blur")

    def check_model(self, model: ModelConfig) -> None:
        if model.out_channels != model.in_channels:
            raise ValueError("toy_picture predicts a picture and no variance")


class ToyObjective:
    def __init__(
        self, config: ToyObjectiveConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._config, self._model = config, model

    def timesteps(self, uniform_B: Tensor) -> Tensor:
        return 1000 * uniform_B

    def timesteps_at(self, fraction_B: Tensor) -> Tensor:
        return 1000 * fraction_B

    def losses(self, model: nn.Module, batch: Batch, timestep_B: Tensor) -> Losses:
        noisy = torch.lerp(batch.images, batch.noise, (timestep_B / 1000).view(-1, 1, 1, 1))
        error = model(noisy, timestep_B, **arguments(batch, self._model, self._config.condition_dropout)).float()
        error = error - batch.images
        picture_B = error.square().flatten(1).mean(1)
        blur_B = avg_pool2d(error, 4).square().flatten(1).mean(1)
        return Losses(picture_B + self._config.blur_weight * blur_B, {"picture": picture_B, "blur": blur_B})

    def targets(self, batch: Batch) -> Tensor:
        return batch.images


def again_and_again(predict: Predict, x_BCHW: Tensor, num_steps: int) -> Tensor:
    """Predict the picture, add less and less of the noise that is left."""
    times = torch.linspace(1, 0, num_steps + 1).tolist()
    for now, then in pairwise(times):
        picture = predict(x_BCHW, torch.tensor(1000 * now))
        x_BCHW = torch.lerp(picture, x_BCHW, then / now)
    return x_BCHW


OBJECTIVES.add(
    "toy_picture",
    ObjectiveKind(
        config=ToyObjectiveConfig,
        build=ToyObjective,
        samplers={"again": SamplerKind(again_and_again, default_steps=4)},
    ),
)
