"""How engines start: with the same weights however sharded, and with no more memory than a shard and a parameter."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megadit.distributed import Axis, Topology
from megadit.engines.fsdp import TorchEngine
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe

NUM_RANKS = 16
WAYS = {
    "fsdp x2": ("fsdp", 2, 1),
    "fsdp x4": ("fsdp", 4, 1),
    "hsdp 2x2": ("fsdp", 4, 2),
    "zero1 x2": ("zero1", 2, 1),
    "zero2 x4": ("zero2", 4, 1),
    "zero3 x2": ("zero3", 2, 1),
    "zero3 x4": ("zero3", 4, 1),
}


def digest(ranks: list[dict[str, tuple[int, Tensor]]]) -> str:
    """SHA-256 over names and values of the whole parameters that the ranks have ranges of."""
    found = hashlib.sha256()
    for name in sorted(ranks[0]):
        pieces = {offset: values for offset, values in (rank[name] for rank in ranks) if values.numel()}
        found.update(name.encode())
        for offset in sorted(pieces):
            found.update(pieces[offset].numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_initial_weights_depend_on_no_engine_and_no_number_of_ranks(
    way: str, tiny_recipe: Callable[..., Recipe], run_ranks: Callable
) -> None:
    kind, num_ranks, num_replicas = WAYS[way]
    settings = (f"engine.kind={kind}", f"engine.num_ranks={num_ranks}", f"engine.num_replicas={num_replicas}")

    def initial(*overrides: str) -> list[Any]:
        recipe = tiny_recipe(*overrides)
        return [
            rank["initial"] for rank in run_ranks("engine.py", recipe.engine.num_ranks, recipe=recipe, lr_factors=[])
        ]

    assert digest(initial(*settings)) == digest(initial())


class PeakBytes(TorchDispatchMode):
    """The most bytes that the storages of tensors made under it had at any time, those on the meta device left out."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._live.values()))
        return out


@contextmanager
def fake_ranks(num_ranks: int) -> Iterator[None]:
    """A process group whose other ranks do not exist; its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_no_rank_ever_holds_more_than_its_shard_and_one_parameter(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("model.width=256", "model.depth=12", "engine.kind=fsdp")
    with fake_ranks(NUM_RANKS), PeakBytes() as memory:
        engine = TorchEngine(recipe, Topology(shard=Axis(0, NUM_RANKS), joined=True))
        shard = 4 * sum(part.values.numel() for part in engine.shards.values())
    sizes = [4 * torch.Size(spec.shape).numel() for spec in build_table(recipe)]
    assert sum(sizes) > 20 * max(sizes)  # or the test could not tell
    assert shard == pytest.approx(sum(sizes) / NUM_RANKS, rel=0.1)
    state = 3 * shard  # weights and two moments
    assert shard < memory.peak
    assert memory.peak < state + 4 * max(sizes)  # a value is drawn in fp32, scaled and cut
