"""One trial: an ordinary run of a recipe with overrides, in a process of its own.

The process comes from a fork server that has the trainer imported already. It is in a session of its own (a terminal's
Ctrl-C reaches it once, through the sweep), leaves a checkpoint when the sweep dies, and writes to RUN/log.txt.
"""

import fcntl
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

from megadit.launcher.failures import run_reporting
from megadit.launcher.train import train

LOG_NAME = "log.txt"
# torch._dynamo: torch imports it when the first optimizer is made, which takes as long as a short trial.
_PRELOADED = ["megadit.training.trainer", "megadit.engines.fsdp", "megadit.tuning.trial", "torch._dynamo"]
_ERROR = "megadit: error: "  # as launcher/failures.py reports it
_NOT_FINITE = re.compile(r"the gradient norm is (nan|inf)")


def start(source: Path, overrides: Sequence[str], run: Path, environment: Mapping[str, str]) -> ForkServerProcess:
    """Start `megadit train SOURCE OVERRIDES --run RUN` in a new process with `environment` in place of ours.

    Its exit code is that of the command.
    """
    process = fork_server().Process(target=_main, args=(str(source), tuple(overrides), run, dict(environment)))
    process.start()
    return process


def fork_server() -> ForkServerContext:
    """Where processes come from that have the trainer imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def failure(run: Path, exit_code: int) -> str:
    """What a trial said that ended with another exit code than 0."""
    if exit_code < 0:
        hint = " (as the kernel does when memory runs out)" if -exit_code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-exit_code).name}{hint}"
    said = [line for line in (run / LOG_NAME).read_text(errors="replace").splitlines() if line.startswith(_ERROR)]
    return said[-1].removeprefix(_ERROR) if said else f"ended with exit code {exit_code}"


def is_divergence(message: str) -> bool:
    """Whether a trial failed by a gradient that was not finite: it learned too fast, and nothing else is wrong."""
    return _NOT_FINITE.search(message) is not None


def _main(source: str, overrides: Sequence[str], run: Path, environment: Mapping[str, str]) -> None:
    os.setsid()
    os.environ.clear()  # the fork server keeps the environment of its own start
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    with (run / LOG_NAME).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)  # by lines: in the log, an error comes after what led to it
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    folder = os.open(run, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # a trial of a killed sweep may still be writing its checkpoint
    run_reporting(lambda: sys.exit(train(source, overrides, run)))


def _stop_with_the_sweep() -> None:
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os.kill(os.getpid(), signal.SIGTERM)
