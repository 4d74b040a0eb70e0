"""A rank scores a folder of images by GenEval with tiny networks, to the end or until it is killed."""

import os
import signal
from pathlib import Path
from typing import Any

from megadit.distributed import process_group
from megadit.eval.geneval import detector
from megadit.eval.geneval.judging import Protocol, score_geneval


def main(
    folder: Path,
    weights: Path,
    metric: str,
    protocol: Protocol,
    short_side: int,
    num_rows: int | None = None,
    torn: bool = False,
) -> dict[str, Any]:
    """The score. With `num_rows` the process is killed when it has written so many rows, and half of one if `torn`."""
    detector.SHORT_SIDE = short_side
    if num_rows is not None:
        kill_after(num_rows, torn)
    with process_group(needed=False) as topology:
        return score_geneval(folder, weights, metric, topology, protocol)


def kill_after(num_rows: int, torn: bool) -> None:
    left, fsync = num_rows, os.fsync

    def counted(descriptor: int) -> None:
        nonlocal left
        fsync(descriptor)
        left -= 1
        if left == 0:
            if torn:
                os.write(descriptor, b'{"prompt": 5, "ima')
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = counted
