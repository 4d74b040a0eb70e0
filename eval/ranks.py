"""One command line, one process or several: what the commands of evaluation share. torch is imported inside."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from megadit.launcher.environment import detect, export
from megadit.launcher.failures import DONE
from megadit.launcher.local import launch
from megadit.launcher.processes import follow_parent

if TYPE_CHECKING:
    import torch

TIMEOUT_SECONDS = 24 * 3600  # ranks wait for the slowest one's share


def run_on_ranks(num_ranks: int, job: Callable[["torch.device"], None]) -> int:
    """Call `job` with this process's device on the ranks of a process group; returns the exit code.

    Where nobody has started ranks and several are wanted, starts them with the command line of this process.
    """
    follow_parent()
    ranks = detect()
    if not ranks.launched and num_ranks > 1:
        return launch(num_ranks, ["-m", "megadit", *sys.argv[1:]])
    if ranks.launched:
        export(ranks)
    import torch

    from megadit.training.ranks import process_group

    with process_group(needed=False, timeout_seconds=TIMEOUT_SECONDS):
        job(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"))
    return DONE
