"""Arrays as members of a shard: latents and text features in 16 or 8 bits."""

import io

import numpy as np
import torch
from torch import Tensor

INT8_MAX = 127


def to_npy(values: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def to_float16(values: Tensor, what: str) -> np.ndarray:
    """Raises ValueError where a value does not fit into float16; `what` names the tensor."""
    with np.errstate(over="ignore"):
        halves = values.numpy().astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(f"{what} do not fit into float16")
    return halves


def to_bfloat16_bits(values: Tensor, what: str) -> np.ndarray:
    """The nearest bfloat16 values as uint16: numpy has no such type. Raises ValueError where one is not finite."""
    halves = values.to(torch.bfloat16)
    if not bool(halves.isfinite().all()):
        raise ValueError(f"{what} are not finite")
    return halves.view(torch.int16).numpy().view(np.uint16)


def to_int8(tokens_LD: Tensor, what: str) -> tuple[np.ndarray, np.ndarray]:
    """int8 [L, D] and the scales of the tokens, float16 [L]: value = int8 * scale, off by half a scale at most.

    A scale is the largest magnitude of its token over 127, rounded up, so that nothing is cut off. Raises ValueError
    where a scale does not fit into float16.
    """
    values = tokens_LD.numpy().astype(np.float32)
    exact_L = np.abs(values).max(axis=1) / INT8_MAX
    with np.errstate(over="ignore"):
        scale_L = exact_L.astype(np.float16)
    scale_L = np.where(scale_L < exact_L, np.nextafter(scale_L, np.float16(np.inf)), scale_L)
    if not np.isfinite(scale_L).all():
        raise ValueError(f"{what} do not fit into int8 with a float16 scale")
    divisor_L = np.where(scale_L > 0, scale_L, 1).astype(np.float32)
    return np.rint(values / divisor_L[:, None]).astype(np.int8), scale_L
