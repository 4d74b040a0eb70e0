"""A text encoder that is spread over the ranks before it has weights, so that no rank ever holds all of them.

T5-XXL's encoder has 19 GB in fp32, and a machine of eight ranks would hold it eight times. Here a rank builds the model
without memory, gives it that of its own share, and reads its rows of each tensor, one file after the other. Files are
mapped, not read: what a rank does not use of them is not loaded.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from megadit.data.encoders.text_encoder import TextEncoder, TextEncoderError
from megadit.distributed import Topology
from megadit.engines.base import Shard, materialise
from megadit.engines.fsdp import shard_of


def load_sharded(
    topology: Topology, name_or_path: str, max_tokens: int, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """The encoder that `TextEncoder.load` gives, spread over all ranks, which then must encode equally often.

    Raises TextEncoderError.
    """
    fill = partial(_spread_and_read, device=device, num_ranks=topology.size)
    return TextEncoder.load_by(fill, name_or_path, max_tokens, dtype)


def _spread_and_read(model: PreTrainedModel, files: Sequence[Path], device: torch.device, num_ranks: int) -> None:
    """Give this rank its share of `model`, whose parameters are on the meta device, with the values in `files`."""
    names: dict[int, list[str]] = {}  # of each parameter: T5's token embedding has two
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    _shard(model, device, num_ranks)
    materialise(model, device, device)
    for first, *others in names.values():  # by now they are parameters of their own
        for name in others:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, model.get_parameter(first))
    _read(model, files)


def _shard(model: nn.Module, device: torch.device, num_ranks: int) -> None:
    """Spread the weights over all ranks, block by block: those of one block at a time are gathered."""
    mesh = dist.init_device_mesh(device.type, (num_ranks,))
    lists = [found for found in model.modules() if isinstance(found, nn.ModuleList)]
    for block in max(lists, key=_num_parameters):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # by default what is in no block would stay gathered


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _read(model: PreTrainedModel, files: Sequence[Path]) -> None:
    """Fill this rank's rows of every parameter. Raises TextEncoderError where the files do not have them, once."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read: dict[int, str] = {}  # parameter -> the key that its values had
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                name = key if key in parameters else key.removeprefix(f"{model.base_model_prefix}.")
                if name not in parameters:
                    continue  # of what does not encode: T5's decoder, heads
                parameter = parameters[name]
                shard = shard_of(parameter)
                rows = _rows(file.get_slice(key), shard, f"text encoder {path}: {key}")
                if id(parameter) not in read:
                    shard.values.copy_(rows)
                elif not torch.equal(shard.values, rows.to(shard.values)):
                    raise TextEncoderError(f"text encoder {path}: {key} and {read[id(parameter)]} should be the same")
                read.setdefault(id(parameter), key)
    missing = [name for name, parameter in parameters.items() if id(parameter) not in read]
    if missing:
        raise TextEncoderError(f"text encoder {files[0].parent}: no file has {missing[0]} ({len(missing)} are missing)")


def _rows(stored: Any, shard: Shard, where: str) -> Tensor:
    """The range of a shard, flat, of a tensor of a file."""
    shape, expected = stored.get_shape(), list(shard.shape)
    if shape != expected:
        raise TextEncoderError(f"{where} has the shape {shape}, the configuration asks for {expected}")
    row_size = math.prod(shard.shape[1:])
    first, num_rows = shard.offset // row_size, shard.values.numel() // row_size
    return stored[first : first + num_rows].flatten() if num_rows else shard.values
