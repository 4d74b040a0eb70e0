"""The engine-neutral form of a checkpoint: every tensor is stored flat, each rank writing the ranges that it owns.

torch.distributed.checkpoint (DCP) resharding needs to know which part of a tensor a rank holds. It asks objects with
the three methods below (its `_Checkpointable` protocol). FSDP2's dim-0 shards, ZeRO-3's partitions and whole tensors
are all contiguous ranges of the flattened tensor, so one class serves every engine and DCP reads any of them as any
other.
"""

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatRange(Tensor):
    """The range [offset, offset + len) of a flat tensor of `total` elements, sharing the memory of `values`."""

    offset: int
    total: int

    @staticmethod
    def of(values: Tensor, offset: int, total: int) -> "FlatRange":
        assert values.dim() == 1 and offset + values.numel() <= total
        part = values.detach().as_subclass(FlatRange)
        part.offset, part.total = offset, total
        return part

    def size(self, dim: int | None = None) -> torch.Size | int:  # type: ignore[override]
        """The size of the whole flat tensor: what DCP compares with the stored one."""
        size = torch.Size([self.total])
        return size if dim is None else size[dim]

    @property
    def plain(self) -> Tensor:
        """The values as an ordinary tensor."""
        return self.as_subclass(Tensor)

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.offset]), torch.Size([self.plain.numel()]))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.plain.numel() else []

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if not self.plain.numel():
            return []
        data = TensorWriteData(self._chunk(), TensorProperties.create_from_tensor(self.plain), torch.Size([self.total]))
        return [WriteItem(MetadataIndex(name, torch.Size([self.offset])), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.plain
