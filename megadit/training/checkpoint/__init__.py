"""Checkpoints: one format for every engine and world size, whole or not there.

    RUN/checkpoints/images-0000012800/
        checkpoint.json    images seen, parameter shapes, size and CRC-32 of every file, its own included: written last
        .metadata, *.distcp    torch.distributed.checkpoint: flat fp32 ranges under KIND/PARAMETER

KIND is `weight`, `exp_avg`, `exp_avg_sq` or the name of an average. A checkpoint is written under a temporary name,
synced and renamed, so a folder with the final name is complete; what happens to it afterwards is found by the CRCs on
loading, and the one before is used. The newest is found by name: nothing points to it.

`files` knows the folder, `writer` fills one, `saver` calls it beside the training loop, `loading` reads, `copies` keeps
a second copy elsewhere, `export` makes files for inference.
"""

from megadit.training.checkpoint.files import CheckpointError, Header, find_damage, newest_first, read_header
from megadit.training.checkpoint.loading import load, newest_valid, read_tensors
from megadit.training.checkpoint.saver import Saver

__all__ = [
    "CheckpointError",
    "Header",
    "Saver",
    "find_damage",
    "load",
    "newest_first",
    "newest_valid",
    "read_header",
    "read_tensors",
]
