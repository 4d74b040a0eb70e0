"""Which rank this process is, along which axes. Made by `process_group` alone, and handed on to whoever asks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")


@dataclass(frozen=True)
class Axis:
    """A place among `size` ranks that differ in one thing."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Topology:
    """All ranks, in rows: those of a row hold the shards of one model, and each row is a replica of it (HSDP).

    Its methods are called by all ranks together. What shards data asks for `data`, what logs for `is_first`.
    """

    replicate: Axis = Axis()
    shard: Axis = Axis()
    joined: bool = False  # whether there is a process group, which one rank may have, too

    def with_replicas(self, num_replicas: int) -> "Topology":
        """The same ranks in other rows. Raises ValueError where `num_replicas` do not divide them."""
        if self.size % num_replicas:
            raise ValueError(f"engine.num_replicas {num_replicas} does not divide the {self.size} ranks")
        num_shards = self.size // num_replicas
        replicate = Axis(self.rank // num_shards, num_replicas)
        return replace(self, replicate=replicate, shard=Axis(self.rank % num_shards, num_shards))

    @property
    def data(self) -> Axis:
        """The ranks that take different samples: all of them."""
        return Axis(self.rank, self.size)

    @property
    def rank(self) -> int:
        """The place among all ranks."""
        return self.replicate.rank * self.shard.size + self.shard.rank

    @property
    def size(self) -> int:
        """The number of all ranks."""
        return self.replicate.size * self.shard.size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this rank: its GPU where there is one, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @cached_property
    def mesh(self) -> DeviceMesh:
        """What FSDP2 shards over: all ranks in a row, or `replicate` rows of `shard` ranks."""
        if self.replicate.size == 1:
            return dist.init_device_mesh(self.device.type, (self.size,))
        shape = (self.replicate.size, self.shard.size)
        return dist.init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.joined:
            dist.all_reduce(values)
        return values

    def on_first(self, function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
        """Run `function` on the first rank and give its result, or its error, to every rank.

        `group` is another one of all ranks to do so on.
        """
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = function()
            except Exception as error:  # handed to every rank, raised below
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def on_every(self, function: Callable[[], Result]) -> list[Result]:
        """Run `function` on every rank and give all results, by rank, or the first rank's error, to every rank."""
        if self.size == 1:
            return [function()]
        box: tuple[Result | None, Exception | None]
        try:
            box = function(), None
        except Exception as error:  # handed to every rank, raised below: the others must not wait for this one
            box = None, error
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, box)
        for _, raised in boxes:
            if raised is not None:
                raise raised
        return [result for result, _ in boxes]


ALONE = Topology()  # of a process that nobody else works with
