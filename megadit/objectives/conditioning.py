"""From a batch to the conditions that a model takes."""

from torch import Tensor

from megadit.batch import Batch
from megadit.models import ModelConfig


def arguments(batch: Batch, config: ModelConfig, condition_dropout: float) -> dict[str, Tensor]:
    """Keyword arguments of the model: its conditions, and where they are dropped."""
    conditions = {name: getattr(batch, name) for name in config.conditions.columns}
    return conditions | {"dropped_B": batch.drop_uniform < condition_dropout}
