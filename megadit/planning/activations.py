"""What a forward and a backward pass hold beside weights and their gradients, found by running both without memory.

The model runs on fake tensors, with the checkpointing of the recipe; every storage is watched from the operation that
makes it until nothing refers to it. So whatever PyTorch keeps is counted: saved activations, what selective
checkpointing keeps, what a block computes again, and what an operation needs for a moment. Blocks are not compiled: a
compiled block keeps at most what the plain one does.
"""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadit import models
from megadit.engines.blocks import prepare_blocks
from megadit.models import ModelConfig
from megadit.recipe import Recipe
from megadit.recipe.schema import Engine as EngineSettings

TRACED_SIZES = (2, 3)  # samples; everything grows evenly from there on (one sample has views where more have copies)


@dataclass(frozen=True)
class Activations:
    """Bytes beyond weights and gradients."""

    training: int  # the most while a micro-batch goes forward and back
    evaluation: int  # the most of a forward pass without gradients
    block: int = 0  # what each block adds to the first


def activations(recipe: Recipe, training_samples: int, evaluation_samples: int, text_tokens: int) -> Activations:
    """For micro-batches of so many samples, whose captions have `text_tokens` tokens."""
    config, level = recipe.model, recipe.engine.activation_checkpointing
    autocast = recipe.engine.kind == "single" and recipe.training.precision == "bf16"
    period = level if isinstance(level, int) else 1  # blocks differ within it, and the last from all others
    depths = [1 + (config.depth - 1) % period + number * period for number in ((1, 2) if period > 1 else (2, 3))]
    if depths[1] > config.depth:
        depths = [config.depth] * 2

    def traced(num_samples: int, depth: int) -> Activations:
        return _trace(config.with_depth(depth), recipe.training.precision, autocast, level, num_samples, text_tokens)

    def of(item: str, num_samples: int) -> tuple[int, int]:
        """Of all blocks and of one. More samples and more blocks add the same each."""
        by_depth = []
        for depth in depths:
            fewer, more = (getattr(traced(size, depth), item) for size in TRACED_SIZES)
            step = (more - fewer) // (TRACED_SIZES[1] - TRACED_SIZES[0])
            by_depth.append(fewer + (num_samples - TRACED_SIZES[0]) * step)
        shallow, deep = by_depth
        block = (deep - shallow) // max(1, depths[1] - depths[0])
        return shallow + (config.depth - depths[0]) * block, block

    training, block = of("training", training_samples)
    return Activations(training, of("evaluation", evaluation_samples)[0], block)


@cache
def _trace(
    config: ModelConfig, precision: str, autocast: bool, level: Any, num_samples: int, text_tokens: int
) -> Activations:
    bf16 = precision == "bf16"
    casting: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with FakeTensorMode():
        # Not cast afterwards, which tensors without memory cannot be.
        with _default_dtype(torch.bfloat16 if bf16 and not autocast else torch.float32):
            model = models.build(config)
        prepare_blocks(model, EngineSettings(activation_checkpointing=level))
        arguments = _samples(config, num_samples, text_tokens)
        with _Storages() as storages:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(storages.take_gradient)
            with casting:
                predicted = model(**arguments)
            loss = sum(part.float().square().mean() for part in tree_leaves(predicted))
            del predicted
            loss.backward()
            training = storages.peak()
        with _Storages() as storages, torch.no_grad(), casting:
            model(**_without_features(arguments))
            return Activations(training, storages.peak())


class _Storages(TorchDispatchMode):
    """Keeps a record of the storages that operations make: of what size, from when, until when."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # storage -> its event
        self._events: list[int] = []  # bytes that are taken (above zero) or given back, in the order of time

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten._local_scalar_dense.default:
            return 0  # what DiT asks of its labels: none is out of range
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._alive and id(storage) not in known:
                    self._alive[storage] = len(self._events)
                    self._events.append(storage.nbytes())
                    weakref.finalize(storage, self._events.append, -storage.nbytes())
        return result

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """A gradient belongs to others from the operation on that made it."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self._events[self._alive[storage]] = 0
        self._events.append(storage.nbytes())  # for what will be taken away when it goes
        parameter.grad = None

    def peak(self) -> int:
        held, most = 0, 0
        for change in self._events:
            held += change
            most = max(most, held)
        return most


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _samples(config: ModelConfig, num_samples: int, text_tokens: int) -> dict[str, Any]:
    """Arguments of the model for so many samples; a head for features of an encoder is asked for them."""
    taken = config.conditions
    columns = {
        "labels": torch.tensor([0] * num_samples),
        "text": torch.zeros(num_samples, text_tokens, taken.text_dim or 1),
        "text_lengths": torch.tensor([text_tokens] * num_samples),
        "pooled": torch.zeros(num_samples, taken.pooled_dim or 1),
    }
    x_BCHW = torch.zeros(num_samples, config.in_channels, config.input_size, config.input_size)
    asked = {"return_features": True} if config.feature_dim else {}
    return {
        "x_BCHW": x_BCHW,
        "timestep_B": torch.zeros(num_samples),
        **{name: columns[name] for name in taken.columns},
        **asked,
    }


def _without_features(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "return_features"}
