"""One rank saves its ranges of flat tensors, each cut in its own way."""

from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megadit.training.flat_range import FlatRange
from megadit.training.ranks import process_group


def main(tensors: dict[str, Tensor], cuts: dict[str, list[int]], folder: Path) -> None:
    """Rank r owns [cuts[name][r], cuts[name][r + 1]) of each tensor."""
    with process_group(needed=True):
        state = {}
        for name, whole in tensors.items():
            start, end = cuts[name][dist.get_rank() : dist.get_rank() + 2]
            state[name] = FlatRange.of(whole[start:end].clone(), start, whole.numel())
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True))
