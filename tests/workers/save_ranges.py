"""One rank saves its ranges of flat tensors, each cut in its own way."""

from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor

from megadit.distributed import process_group
from megadit.training.checkpoint.flat_range import FlatRange
from megadit.training.checkpoint.folders import FORMAT, Header
from megadit.training.checkpoint.writer import Writer


def main(tensors: dict[str, Tensor], ranges: list[dict[str, tuple[int, int]]], folder: Path) -> None:
    """Rank r owns [start, end) of each tensor, with (start, end) from `ranges[r]`."""
    with process_group(needed=True) as topology:
        state = {}
        for name, whole in tensors.items():
            start, end = ranges[topology.rank][name]
            state[f"weight/{name}"] = FlatRange.of(whole[start:end].clone(), start, whole.numel())
        shapes = {name: list(whole.shape) for name, whole in tensors.items()}
        header = Header(FORMAT, images_seen=0, num_steps=0, shapes=shapes, averages=[], files={}, index_crc=0)
        dcp.save(state, storage_writer=Writer(folder, header, lambda: None))
