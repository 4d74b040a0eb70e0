"""The joint qkv step against plain PyTorch."""

import pytest
import torch
from torch import Tensor

from megadit.kernels.attention import attention, describe
from megadit.kernels.joint_qkv import joint_qkv, joint_qkv_reference


def _inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 3, 24), (2, 2, 24), (2, 4), (2, 4)]  # 2 heads of 4
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def test_gradients_are_those_of_the_forward_pass() -> None:
    assert torch.autograd.gradcheck(joint_qkv, _inputs(torch.float64))


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous gradients", "transposed gradients"])
def test_equals_the_reference(transposed: bool) -> None:
    results = []
    for function in (joint_qkv, joint_qkv_reference):
        inputs = _inputs(torch.float64)
        outputs = function(*inputs)
        torch.manual_seed(1)
        directions = [torch.randn_like(y) for y in outputs]
        if transposed:
            directions = [d.transpose(1, 2).contiguous().transpose(1, 2) for d in directions]
        torch.autograd.backward(outputs, directions)
        results.append([*outputs, *(x.grad for x in inputs)])
    torch.testing.assert_close(*results)


def test_bf16_is_as_exact_as_the_reference() -> None:
    exact = joint_qkv_reference(*_inputs(torch.float32))
    for y, reference, truth in zip(
        joint_qkv(*_inputs(torch.bfloat16)), joint_qkv_reference(*_inputs(torch.bfloat16)), exact, strict=True
    ):
        assert y.dtype == torch.bfloat16
        assert (y - truth).abs().max() <= 2 * (reference - truth).abs().max()


def test_attention_is_softmax_of_visible_keys() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 3, 4) for _ in range(3))
    visible = torch.tensor([[True, True, False, True, False], [True] * 5])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(attention(q, k, v, visible), torch.einsum("bhqk,bkhd->bqhd", weights, v))
    assert "scaled_dot_product_attention" in describe()
