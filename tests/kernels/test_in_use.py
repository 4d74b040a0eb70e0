"""What the start-up block says of our kernels is what autograd saw."""

import pytest
import torch
from torch import Tensor

from megadit import models
from megadit.kernels import in_use
from megadit.models.dit import DiTConfig
from megadit.models.mmdit import MMDiTConfig
from megadit.models.pixart import PixArtConfig

SMALL = {"input_size": 8, "patch_size": 4, "width": 32, "depth": 1}
MODELS = {
    "dit": DiTConfig(**SMALL, head_dim=16, num_classes=3),
    "pixart": PixArtConfig(**SMALL, head_dim=16, text_dim=8),
    "mmdit": MMDiTConfig(**SMALL, head_dim=16, text_dim=8, pooled_dim=8),
}
FUNCTIONS = {"_SigmoidGeluBackward": "gelu_tanh", "_JointQKVBackward": "joint_qkv"}


@pytest.mark.parametrize("family", MODELS)
def test_kernels_in_use_are_those_that_ran(family: str) -> None:
    config = MODELS[family]
    columns = {
        "labels": torch.tensor([0, 1]),
        "text": torch.randn(2, 3, 8),
        "text_lengths": torch.tensor([3, 2]),
        "pooled": torch.randn(2, 8),
    }
    x = torch.randn(2, config.in_channels, 8, 8)
    conditions = {name: columns[name] for name in config.conditions.columns}
    y = models.build(config)(x, torch.zeros(2), dropped_B=torch.tensor([False, False]), **conditions)
    called = models.family_of(config).kernels
    assert in_use(called, "cpu", compiled=False) == sorted(_ours(y))
    assert in_use(called, "cpu", compiled=True) == []


def _ours(y: Tensor) -> set[str]:
    found: set[str] = set()
    seen, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in FUNCTIONS:
            found.add(FUNCTIONS[node.name()])
        nodes += [parent for parent, _ in node.next_functions]
    return found
