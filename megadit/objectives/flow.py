"""Rectified flow: predict the velocity noise - image on the straight path (arXiv 2403.03206, section 2)."""

import torch
from torch import Tensor, nn

from megadit.batch import Batch
from megadit.models import ModelConfig
from megadit.objectives.conditioning import arguments
from megadit.recipe import FlowObjective


class Flow:
    """The objective `flow`, with the alignment loss of REPA where the recipe asks for it."""

    def __init__(self, objective: FlowObjective, config: ModelConfig, device: torch.device) -> None:
        self._objective = objective
        self._model = config
        self._alignment = None
        if objective.repa is not None:
            from megadit.objectives.repa import Alignment

            self._alignment = Alignment(objective.repa, config, device)

    def timesteps(self, uniform_B: Tensor) -> Tensor:
        """Logit-normal: t = sigmoid(mean + std * normal quantile)."""
        logits_B = self._objective.logit_mean + self._objective.logit_std * torch.special.ndtri(uniform_B)
        return 1000 * torch.sigmoid(logits_B)

    def timesteps_at(self, fraction_B: Tensor) -> Tensor:
        return 1000 * fraction_B

    def losses(self, model: nn.Module, batch: Batch, timestep_B: Tensor) -> Tensor:
        """Mean squared velocity error, plus the weighted alignment loss."""
        noisy = torch.lerp(batch.images, batch.noise, (timestep_B / 1000).view(-1, 1, 1, 1))
        conditions = arguments(batch, self._model, self._objective.condition_dropout)
        if self._alignment is None:
            return _squared_error(model(noisy, timestep_B, **conditions), self.targets(batch))
        assert self._objective.repa is not None
        prediction, features_BTF = model(noisy, timestep_B, **conditions, return_features=True)
        alignment_B = self._alignment.losses(features_BTF, batch.images)
        return _squared_error(prediction, self.targets(batch)) + self._objective.repa.weight * alignment_B

    def targets(self, batch: Batch) -> Tensor:
        return batch.noise - batch.images


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target).square().flatten(1).mean(1)
