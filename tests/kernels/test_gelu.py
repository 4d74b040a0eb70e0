"""The CPU's GELU against PyTorch's."""

import torch
import torch.nn.functional as F

from megadit.kernels.gelu import gelu_tanh

# to +-12, where the tanh form has long saturated, and zero itself
POINTS = torch.cat([torch.linspace(-12, 12, 997), torch.zeros(1)])


def _value_and_slope(function: object, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)  # type: ignore[operator]
    y.sum().backward()
    return y.detach(), x.grad


def _reference(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def test_equals_torch_in_fp64() -> None:
    for ours, theirs in zip(
        _value_and_slope(gelu_tanh, POINTS.double()), _value_and_slope(_reference, POINTS.double()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_errs_by_rounding_alone_in_fp32() -> None:
    """The slope's error is about twice PyTorch's: near x = 5, s is rounded by 3e-8 and multiplied by 35."""
    exact = _value_and_slope(_reference, POINTS.double())
    for found, truth, bound in zip(_value_and_slope(gelu_tanh, POINTS), exact, (1e-6, 4e-6), strict=True):
        assert (found - truth).abs().max() < bound


def test_is_exact_to_rounding_in_bf16() -> None:
    points = POINTS.bfloat16()
    for ours, exact in zip(
        _value_and_slope(gelu_tanh, points), _value_and_slope(_reference, points.double()), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-6)
