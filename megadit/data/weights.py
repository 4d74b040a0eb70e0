"""Which weights a pretrained encoder has, as data sets state it."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK_BYTES = 1 << 24


def weights_sha256(files: Iterable[Path]) -> str:
    """The sha256 of the files one after the other, in hexadecimal; they may be larger than the memory."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
