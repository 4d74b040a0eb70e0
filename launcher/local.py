"""Local ranks: N processes of this machine, started and watched by torchrun's own launch API."""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from megadit.exit_codes import DONE, FAILED, INTERRUPTED, INTERRUPTED_WITH_NOTHING
from megadit.launcher.failures import FAILURES_VARIABLE, first_failure
from megadit.launcher.processes import child_environment, forwarding


def launch(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run `python ARGUMENTS` as `num_ranks` ranks; stop signals are forwarded to them.

    Returns 0 when all have finished, 75 when each that has not was interrupted with a checkpoint, and otherwise the
    exit code of the rank that failed first (1 for one killed by a signal), after saying on one line what it said.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_elastic()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=f"megadit-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # the ranks' output goes straight to the terminal
        signals_to_handle="",  # elastic would kill the ranks 30 s after a signal: less than a checkpoint may take
    )
    with tempfile.TemporaryDirectory(prefix="megadit-") as failures, forwarding(psutil.Process().children):
        os.environ.update({**rank_environment(num_ranks), FAILURES_VARIABLE: failures})
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return _outcome(codes, Path(failures))
    return DONE


def rank_environment(num_ranks: int) -> dict[str, str]:
    """Variables that local ranks get beside those that say which rank each is; what the user has set wins."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // num_ranks)), "GLOO_SOCKET_IFNAME": loopback}
    chosen = {name: os.environ.get(name, value) for name, value in defaults.items()}
    return {**chosen, **child_environment()}


def _outcome(codes: dict[int, int], failures: Path) -> int:
    """The exit code for ranks that ended with `codes` (those that were not 0), after saying what failed first."""
    broken = {rank: code for rank, code in codes.items() if code != INTERRUPTED}
    if not broken:
        return INTERRUPTED
    rank, message = first_failure(failures) or _silent_failure(broken)
    if broken.get(rank) == INTERRUPTED_WITH_NOTHING or all(code == -signal.SIGINT for code in broken.values()):
        return INTERRUPTED_WITH_NOTHING
    print(f"megadit: error: rank {rank}: {message}", file=sys.stderr)
    return max(FAILED, broken.get(rank, FAILED))


def _silent_failure(codes: dict[int, int]) -> tuple[int, str]:
    """A rank that ended without a message, and how: one killed by a signal first, but for elastic's own SIGTERM."""
    rank = min(codes, key=lambda rank: (codes[rank] == -signal.SIGTERM, codes[rank] >= 0, rank))
    code = codes[rank]
    if code >= 0:
        return rank, f"ended with exit code {code}"
    hint = " (as the kernel does when memory runs out)" if -code == signal.SIGKILL else ""
    return rank, f"killed by {signal.Signals(-code).name}{hint}"


def _silence_elastic() -> None:
    """Keep elastic's table of failures off the screen: `_outcome` says it in one line."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
