"""Rectified flow: predict the velocity noise - image on the straight path (arXiv 2403.03206, section 2).

It is sampled by diffusers' flow-matching schedulers: Euler and Heun.
"""

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from megadit.batch import Batch
from megadit.models import ModelConfig
from megadit.node import STAGE, Node, Power, identity
from megadit.objectives.objective import (
    SAME_LOSS,
    Losses,
    ObjectiveConfig,
    ObjectiveKind,
    Predict,
    SamplerKind,
    arguments,
)

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

NUM_TIMESTEPS = 1000  # times are t * 1000


class RepaLoss(Node):
    """Alignment with a pretrained image encoder (arXiv 2410.06940); the model needs `model.repa`, too."""

    weight: Annotated[Power, Field(ge=0), STAGE] = 0.5
    encoder: str | None = None  # folder of a transformers DINOv2 model, for data that has no features of it


class FlowObjective(ObjectiveConfig):
    """Rectified flow with logit-normal timesteps (arXiv 2403.03206, section 3.1)."""

    kind: Annotated[Literal["flow"], SAME_LOSS] = "flow"
    logit_mean: Annotated[float, STAGE] = 0.0
    logit_std: Annotated[float, Field(gt=0), STAGE] = 1.0
    repa: Annotated[RepaLoss | None, identity("the head is trained to one encoder's features")] = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Mean squared error of the velocity; minus the mean cosine with the encoder's features."""
        return ("velocity",) if self.repa is None else ("velocity", "alignment")

    def check_model(self, model: ModelConfig) -> None:
        if model.out_channels != model.in_channels:
            raise ValueError(f"objective.kind flow needs learn_sigma: false (family {model.family})")
        if (model.feature_dim is None) != (self.repa is None):
            raise ValueError("model.repa (the head) and objective.repa (its loss) go together: state both or neither")

    @property
    def needs_squares(self) -> str | None:
        return None if self.repa is None else "objective.repa"

    @property
    def needs_features(self) -> str | None:
        return self.needs_squares

    @property
    def image_encoder(self) -> str | None:
        return None if self.repa is None else self.repa.encoder

    @property
    def paper_space(self) -> tuple[str, ...]:
        return () if self.repa is None else ("objective.repa.weight=0.1..2.0",)


class Flow:
    """The objective `flow`, with the alignment loss of REPA where the recipe asks for it."""

    def __init__(self, objective: FlowObjective, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._objective = objective
        self._model = config
        self._alignment = None
        if objective.repa is not None:
            from megadit.objectives.repa import Alignment

            self._alignment = Alignment(objective.repa.encoder, config, device, dtype)

    def timesteps(self, uniform_B: Tensor) -> Tensor:
        """Logit-normal: t = sigmoid(mean + std * normal quantile)."""
        logits_B = self._objective.logit_mean + self._objective.logit_std * torch.special.ndtri(uniform_B)
        return 1000 * torch.sigmoid(logits_B)

    def timesteps_at(self, fraction_B: Tensor) -> Tensor:
        return 1000 * fraction_B

    def losses(self, model: nn.Module, batch: Batch, timestep_B: Tensor) -> Losses:
        """Mean squared velocity error, plus the weighted alignment loss."""
        noisy = torch.lerp(batch.images, batch.noise, (timestep_B / 1000).view(-1, 1, 1, 1))
        conditions = arguments(batch, self._model, self._objective.condition_dropout)
        if self._alignment is None:
            velocity_B = _squared_error(model(noisy, timestep_B, **conditions), self.targets(batch))
            return Losses(velocity_B, {"velocity": velocity_B})
        assert self._objective.repa is not None
        prediction, features_BTF = model(noisy, timestep_B, **conditions, return_features=True)
        alignment_B = self._alignment.losses(features_BTF, batch)
        velocity_B = _squared_error(prediction, self.targets(batch))
        total_B = velocity_B + self._objective.repa.weight * alignment_B
        return Losses(total_B, {"velocity": velocity_B, "alignment": alignment_B})

    def targets(self, batch: Batch) -> Tensor:
        return batch.noise - batch.images


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target).square().flatten(1).mean(1)


def euler(predict: Predict, x_BCHW: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """From noise to images [B, C, H, W] along the predicted velocity, one prediction a step; see `times`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times(num_steps, shift)[:-1].tolist())
    return _follow(scheduler, predict, x_BCHW)


def heun(predict: Predict, x_BCHW: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """From noise to images [B, C, H, W] by Heun's method (the explicit trapezoid), two predictions a step.

    The last step, to time 0, is one of Euler, as diffusers has it. See `times`.
    """
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    # Its own times are not evenly spaced, and with a shift are shifted twice.
    first, *inner, last = times(num_steps, shift).float()
    scheduler.sigmas = torch.stack([first, *(time for time in inner for _ in range(2)), last])
    scheduler.timesteps = scheduler.sigmas[:-1] * NUM_TIMESTEPS
    return _follow(scheduler, predict, x_BCHW)


def times(num_steps: int, shift: float = 1.0) -> Tensor:
    """The times from 1 to 0 between steps, float64 [num_steps + 1]: evenly spaced, then shifted to noise.

    t' = shift t / (1 + (shift - 1) t), arXiv 2403.03206, section 5.3.2; 3 is what SD3 takes at 1024 pixels.
    """
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


def _follow(
    scheduler: "FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler", predict: Predict, x_BCHW: Tensor
) -> Tensor:
    for timestep in scheduler.timesteps:
        x_BCHW = scheduler.step(predict(x_BCHW, timestep), timestep, x_BCHW).prev_sample
    return x_BCHW


FLOW_KIND = ObjectiveKind(
    config=FlowObjective,
    build=Flow,
    samplers={
        "euler": SamplerKind(euler, default_steps=28, takes=("shift",)),  # as SD3
        "heun": SamplerKind(heun, default_steps=28, takes=("shift",)),
    },
)
