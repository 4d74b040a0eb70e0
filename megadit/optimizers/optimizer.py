"""What an optimizer is: its part of the recipe, how its hyperparameters follow from width, and its state.

An optimizer is a file here that says all of it. `megadit/optimizers/__init__.py` registers it; engines, checkpoints and
the memory formula read its slots, the parameter table its hyperparameters. Another one, in a module of a user's,
registers itself when it is imported (`imports:` of the recipe).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from megadit.node import STAGE, Node, Power, identity

RESERVED = ("weight", "ema_")  # what checkpoints call weights, and how names of averages begin

SAME_STATE = identity("its state is that of this optimizer")


@dataclass(frozen=True)
class Scaling:
    """What the parametrization says of one parameter."""

    hidden_mult: float  # width / base width of a hidden matrix; 1 for every other parameter
    is_vector: bool  # of one dimension: a bias, or the gain of a norm
    decay_exponent: float  # the decay per step of hidden matrices goes with hidden_mult^-decay_exponent
    scale_eps: bool


class OptimizerConfig(Node):
    """The `optimizer` section of a recipe: what all optimizers share. `lr` is the base rate, scaled by role."""

    kind: Annotated[str, SAME_STATE]
    lr: Annotated[Power, Field(gt=0), STAGE]
    weight_decay: Annotated[Power, Field(ge=0), STAGE] = 0.0
    decay_vectors: Annotated[bool, STAGE] = (
        True  # false: biases and the gains of norms are not decayed; tables and embeddings are
    )
    max_grad_norm: Annotated[Annotated[Power, Field(gt=0)] | None, STAGE] = 1.0  # null: gradients are not clipped
    warmup_steps: Annotated[int, Field(ge=0), STAGE] = 0  # optimizer steps, whatever the number of ranks
    schedule: Annotated[Literal["constant", "cosine"], STAGE] = "constant"  # after warm-up; cosine ends at zero

    @abstractmethod
    def hyperparameters(self, scaling: Scaling) -> dict[str, float]:
        """Of a parameter's group: at least `lr`, and `weight_decay`, which is 0 where nothing is decayed."""

    def base_decay(self, scaling: Scaling) -> float:
        """Weight decay before it is scaled."""
        return 0.0 if scaling.is_vector and not self.decay_vectors else self.weight_decay

    @property
    def depends_on_length(self) -> bool:
        """Whether `lr_factor` of a step depends on the number of steps, so that a longer run is another one."""
        return self.schedule == "cosine"

    def lr_factor(self, step: int, num_steps: int) -> float:
        """The learning rate of step `step` (from 0) of a run of `num_steps`, as a fraction of the base rate."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)))


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that recipes can choose. Its name is the default of `config.kind`.

    Engines give it flat fp32 ranges of parameters, which may be empty: what it does must be element by element.
    """

    config: type[OptimizerConfig]
    slots: tuple[str, ...]  # tensors of a parameter's state, shaped like it, fp32, zero at first
    build: Callable[[Iterable[dict[str, Any]], Any], torch.optim.Optimizer]  # from torch's groups and a config
    counts_steps: bool = False  # the state has `step`, too: a tensor of one number

    def __post_init__(self) -> None:
        assert not any(slot.startswith(RESERVED) for slot in self.slots), self.slots

    @property
    def name(self) -> str:
        return str(self.config.model_fields["kind"].default)

    def set_num_steps(self, state: dict[str, Any], weights: Tensor, num_steps: int) -> None:
        """Put the number of steps made into a parameter's state, which is made where it is not yet.

        Optimizers make it at the first step; a checkpoint may need it before.
        """
        for slot in self.slots:
            if slot not in state:
                state[slot] = torch.zeros_like(weights)
        if self.counts_steps:
            state["step"] = torch.tensor(float(num_steps), device=weights.device)


Slots = Mapping[str, Tensor]  # of one parameter: slot -> values
