"""Checkpoints: one format for every engine and world size, whole or not there.

    RUN/checkpoints/images-0000012800/
        checkpoint.json    images seen, parameter shapes, size of every file, its own CRC-32: written last
        .metadata          the index, torch.distributed.checkpoint's: where each range is, CRC-32 of each of its blocks
        rank-0.bin, ...    flat fp32 ranges of KIND/PARAMETER, bytes and nothing else, one file for each rank

KIND is `weight`, a slot of the optimizer's state (AdamW has `exp_avg` and `exp_avg_sq`) or the name of an average. A
checkpoint is written under a temporary name, synced and renamed, so a folder with the final name is complete; what
happens to it afterwards is found by the CRCs while it is loaded, and the one before is used. The newest is found by
name: nothing points to it.

`files` knows the folder, `extents` the bytes in it, `writer` fills one, `saver` calls it beside the training loop,
`reader` and `loading` read, `copies` keeps a second copy elsewhere, `export` makes files for inference.
"""

from megadit.training.checkpoint.copies import newest_of_run
from megadit.training.checkpoint.folders import CheckpointError, DamageError, Header, newest_first, read_header
from megadit.training.checkpoint.loading import load, load_or_before, load_weights, newest_valid, read_tensors
from megadit.training.checkpoint.reader import find_damage
from megadit.training.checkpoint.saver import Saver

__all__ = [
    "CheckpointError",
    "DamageError",
    "Header",
    "Saver",
    "find_damage",
    "load",
    "load_or_before",
    "load_weights",
    "newest_first",
    "newest_of_run",
    "newest_valid",
    "read_header",
    "read_tensors",
]
