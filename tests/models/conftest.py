"""Settings of the model tests, and a comparison that they share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small only lose by threads, and on a busy machine they lose a factor of ten."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def same_alone() -> Callable[[nn.Module, Callable[[slice, int], Tensor], int, list[int]], None]:
    """A check that padding has no influence, on outputs or gradients."""

    def check(model: nn.Module, run: Callable[[slice, int], Tensor], padded: int, lengths: list[int]) -> None:
        """`run(rows, length)` gives the outputs of `rows` with the first `length` tokens of their captions."""
        y = run(slice(0, len(lengths)), padded)
        y.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        alone = torch.cat([run(slice(row, row + 1), length) for row, length in enumerate(lengths)])
        torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)
        alone.square().sum().backward()
        for name, parameter in model.named_parameters():
            tolerance = 1e-4 * max(1, parameter.grad.abs().max().item())
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=tolerance, msg=name)

    return check
