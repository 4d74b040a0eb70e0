"""Rectified flow: predict the velocity noise - image on the straight path between them (arXiv 2403.03206, section 2).

Time runs as in diffusers' flow-matching schedulers: t = 0 is the image, t = 1 is noise.
"""

import torch
from torch import Tensor, nn

from megadit.data.batch import Batch
from megadit.recipe import FlowObjective


def timesteps(uniform_B: Tensor, objective: FlowObjective) -> Tensor:
    """Logit-normal timesteps in [0, 1] from uniform draws: t = sigmoid(mean + std * normal quantile)."""
    return torch.sigmoid(objective.logit_mean + objective.logit_std * torch.special.ndtri(uniform_B))


def losses(model: nn.Module, batch: Batch, t_B: Tensor, caption_dropout: float) -> Tensor:
    """Mean squared velocity error of each sample, fp32 [B].

    The caption of a sample is dropped where its uniform draw is below `caption_dropout`: classifier-free guidance
    (arXiv 2207.12598) needs the unconditional model too. A dropped caption is one zero token and a zero pooled
    vector, which the biases of the text projections turn into a learned null caption.
    """
    kept_B = batch.drop_uniform >= caption_dropout
    t_B111 = t_B.view(-1, 1, 1, 1)
    prediction = model(
        torch.lerp(batch.images, batch.noise, t_B111),
        t_B,
        text=batch.text * kept_B.view(-1, 1, 1),
        text_lengths=torch.where(kept_B, batch.text_lengths, 1),
        pooled=batch.pooled * kept_B.view(-1, 1),
    )
    target = batch.noise - batch.images
    return (prediction.float() - target).square().flatten(1).mean(1)
