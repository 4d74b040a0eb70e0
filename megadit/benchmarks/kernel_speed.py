"""`megadit bench kernels`: each kernel of ours beside its definition in plain PyTorch, forward and backward.

Times are alternating pairs. Saved bytes are counted, not timed: what autograd keeps of one call for its backward pass,
each storage once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megadit.benchmarks.findings import Cell, Table
from megadit.benchmarks.pairs import time_pairs
from megadit.kernels.attention import attention
from megadit.kernels.gelu import gelu_tanh
from megadit.kernels.joint_qkv import joint_qkv, joint_qkv_reference

TEXT_TOKENS = 77


@dataclass(frozen=True)
class _Case:
    name: str
    ours: Callable[..., object]
    reference: Callable[..., object]
    inputs: Sequence[Tensor]


def bench_kernels(width: int, head_dim: int, num_tokens: int, batch_size: int, precision: str, num_pairs: int) -> Table:
    """At the shapes of a model of this width, on `batch_size` samples of `num_tokens` image tokens.

    Raises ValueError for a width that is no multiple of `head_dim`.
    """
    if width % head_dim:
        raise ValueError(f"--width {width} must be a multiple of --head-dim {head_dim}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows: list[dict[str, Cell]] = []
    for case in _cases(width, head_dim, num_tokens, batch_size, device, dtype):
        ours, theirs = (_step(function, case.inputs) for function in (case.ours, case.reference))
        pairs = time_pairs(ours, theirs, num_pairs)
        saved = [saved_bytes(function, case.inputs) / 2**20 for function in (case.ours, case.reference)]
        rows.append(
            {
                "kernel": case.name,
                "ms": pairs.median_ms(0),
                "ms, PyTorch": pairs.median_ms(1),
                "ratio": 1 / pairs.ratio(),
                "saved MiB": saved[0],
                "saved MiB, PyTorch": saved[1],
            }
        )
    title = f"forward and backward, width {width}, {batch_size} x {num_tokens} tokens, {precision}"
    return Table(f"{title}, median of {num_pairs} pairs", "time of plain PyTorch", rows)


def saved_bytes(function: Callable[..., object], inputs: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps of one call for the backward pass, its inputs included."""
    storages = {}

    def keep(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage()  # held: an address is used once
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        outputs = function(*inputs)
    del outputs
    return sum(storage.nbytes() for storage in storages.values())


def _cases(
    width: int, head_dim: int, num_tokens: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> list[_Case]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    length = num_tokens + TEXT_TOKENS
    qkv = [draw(batch_size, length, width // head_dim, head_dim) for _ in range(3)]
    joint = [draw(batch_size, tokens, 3 * width) for tokens in (num_tokens, TEXT_TOKENS)]
    return [
        _Case(
            "gelu_tanh", gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), [draw(batch_size, num_tokens, 4 * width)]
        ),
        _Case("joint_qkv", joint_qkv, joint_qkv_reference, [*joint, draw(2, head_dim), draw(2, head_dim)]),
        _Case("attention", attention, _written_out, qkv),
    ]


def _written_out(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """Attention by two products and a softmax, which keeps its weights."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q_BSHD, k_BSHD) * q_BSHD.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v_BSHD)


def _step(function: Callable[..., object], inputs: Sequence[Tensor]) -> Callable[[], None]:
    def step() -> None:
        found = function(*inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        torch.autograd.grad([output.sum() for output in outputs], inputs)

    return step
