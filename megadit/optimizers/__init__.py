"""Optimizers, a file for each: how weights follow from gradients, and what state that takes."""

from megadit.optimizers.adamw import ADAMW
from megadit.optimizers.optimizer import OptimizerConfig, OptimizerKind, Scaling, Slots
from megadit.registry import Registry

__all__ = ["OPTIMIZERS", "OptimizerConfig", "OptimizerKind", "Scaling", "Slots", "kind_of"]

OPTIMIZERS: Registry[OptimizerKind] = Registry("optimizer")
OPTIMIZERS.add(ADAMW.name, ADAMW)


def kind_of(config: OptimizerConfig) -> OptimizerKind:
    """The kind of an optimizer's settings."""
    return OPTIMIZERS.get(config.kind)
