"""The memory of a rank while it trains, from the recipe alone: nothing is allocated and no rank is started."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megadit import models, optimizers
from megadit.engines.blocks import num_parameters_of_blocks
from megadit.models import ModelConfig
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe

FP32_BYTES = 4
IN_FLIGHT = 2  # blocks whose whole weights and gradients a rank holds at once: one is at work, one communicated


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, item by item; all are this rank's share but for `gathered` and `activations`."""

    weights: int  # fp32, and what the engine keeps of them in the dtype of the matrix products
    optimizer_state: int
    averages: int
    gradients: int
    gathered: int  # whole weights and gradients, for a part of a step
    activations: int

    @property
    def peak(self) -> int:
        """The most held at once: in the backward pass activations go as gradients come."""
        states = self.weights + self.optimizer_state + self.averages
        return states + self.gathered + max(self.gradients, self.activations)


def predict(recipe: Recipe, num_ranks: int, text_tokens: int) -> Memory:
    """The memory of each of `num_ranks` ranks for captions of `text_tokens` tokens; all of it on one device.

    States are 8 bytes a parameter and 4 for each slot of the optimizer and each average, over the shards; in flight are
    the weights of two blocks in the dtype of the matrix products, and their gradients in fp32. Raises ValueError for
    what this does not cover.
    """
    engine, training = recipe.engine, recipe.training
    _require_covered(recipe)
    sizes = num_parameters_of_blocks(build_table(recipe))
    total, largest = sum(sizes.values()), max(size for name, size in sizes.items() if name)
    num_shards = 1 if engine.kind == "single" else num_ranks // engine.num_replicas
    share = FP32_BYTES * -(-total // num_shards)
    micro_batch = training.micro_batch_size or training.batch_size // num_ranks
    accumulates = micro_batch * num_ranks < training.batch_size
    weight_bytes = 2 if training.precision == "bf16" else FP32_BYTES
    weights, gradients, gathered = share, share, 0
    if engine.kind == "single" and training.precision == "bf16":
        gathered = weight_bytes * total  # autocast's copies live until the backward pass has used them
    elif engine.kind == "fsdp":
        kept = IN_FLIGHT * largest + sizes.get("", 0) if engine.reshard_after_forward else total
        gathered = weight_bytes * kept + FP32_BYTES * IN_FLIGHT * largest
        if accumulates:
            gradients = FP32_BYTES * total  # whole until the last micro-batch: they are reduced once
    elif engine.kind == "zero3":
        weights += weight_bytes * -(-total // num_shards)  # what is gathered is a copy of the share
        # Weights of one block more, which is fetched ahead, and the collective's copy of one (as measured with gloo).
        # Gradients three times: in the bucket, in the order of the ranks that they go to, and the collective's copy.
        gathered = (weight_bytes * (IN_FLIGHT + 2) + FP32_BYTES * 3) * largest
    num_averages = len(training.ema_rates) + len(training.ema_power_stds)
    return Memory(
        weights=weights,
        optimizer_state=len(optimizers.kind_of(recipe.optimizer).slots) * share,
        averages=num_averages * share,
        gradients=gradients,
        gathered=gathered,
        activations=micro_batch * activation_bytes(recipe, text_tokens),
    )


def _require_covered(recipe: Recipe) -> None:
    engine = recipe.engine
    if engine.kind in ("zero1", "zero2"):
        raise ValueError(f"the memory of engine.kind {engine.kind} is not predicted; it is for single, fsdp and zero3")
    if engine.cpu_offload != "none":
        raise ValueError("the memory of a device is not predicted with engine.cpu_offload; use none")
    if engine.activation_checkpointing == "selective":
        raise ValueError("activations are not predicted for selective checkpointing; they are for none, full and k")


def activation_bytes(recipe: Recipe, text_tokens: int) -> int:
    """Bytes that one sample's forward pass keeps for the backward pass; it is run on tensors without memory.

    What the loss keeps, a few times the size of a picture, is not counted. A checkpointed block keeps its inputs; one
    at a time is computed again.
    """
    level = recipe.engine.activation_checkpointing
    every = {"none": 0, "full": 1}.get(level, level) if isinstance(level, str) else level
    saved, inputs = _saved_bytes(recipe.model, recipe.training.precision, text_tokens)
    again = [index for index in inputs if every and index % int(every) == 0]
    kept = sum(saved.values()) - sum(saved[index] - inputs[index] for index in again)
    return kept + max((saved[index] for index in again), default=0)


@cache
def _saved_bytes(config: ModelConfig, precision: str, text_tokens: int) -> tuple[Mapping[int, int], Mapping[int, int]]:
    """For one sample: bytes that the forward pass saves in each block (-1: outside of them), and of each's inputs."""
    saved: Counter[int] = Counter()
    inputs: dict[int, int] = {}
    current = -1
    seen: dict[int, Any] = {}  # storages are held, or another would get the address of one that is gone

    def enter(index: int, arguments: tuple[Any, ...]) -> None:
        nonlocal current
        current = index
        inputs[index] = sum(a.nbytes for a in arguments if isinstance(a, Tensor) and a.requires_grad and a.dim() == 3)

    def leave() -> None:
        nonlocal current
        current = -1

    def save(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            saved[current] += storage.nbytes()
        return value

    with FakeTensorMode():
        with _default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32):
            model = models.build(config)
        for tensor in (*model.parameters(), *model.buffers()):
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        _watch(model, enter, leave)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda value: value):
            model(**_one_sample(config, text_tokens))
    return saved, inputs


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are of `dtype`; tensors without memory cannot be cast afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _watch(model: nn.Module, enter: Any, leave: Any) -> None:
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        block.register_forward_pre_hook(lambda _, arguments, index=index: enter(index, arguments))
        block.register_forward_hook(lambda *_: leave())


def _one_sample(config: ModelConfig, text_tokens: int) -> dict[str, Tensor]:
    """Arguments of the model for one sample."""
    taken = config.conditions
    columns = {
        "labels": torch.tensor([0]),
        "text": torch.zeros(1, text_tokens, taken.text_dim or 1),
        "text_lengths": torch.tensor([text_tokens]),
        "pooled": torch.zeros(1, taken.pooled_dim or 1),
    }
    x_BCHW = torch.zeros(1, config.in_channels, config.input_size, config.input_size)
    given = {name: columns[name] for name in taken.columns}
    return {"x_BCHW": x_BCHW, "timestep_B": torch.zeros(1), **given}
