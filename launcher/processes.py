"""Processes that belong together: signals go down to the children, and no child outlives its parent.

Children that a terminal's Ctrl-C must not reach directly (each would see it at another moment, and twice) run in
sessions of their own; the parent forwards what it receives.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from megadit.exit_codes import INTERRUPTED_WITH_NOTHING

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PARENT_VARIABLE = "MEGADIT_PARENT"  # process id of the parent that a child must not outlive


def child_environment() -> dict[str, str]:
    """Variables for a process that calls `follow_parent` when it starts."""
    # The repository root must stay off sys.path, also when it is the working directory of `python -m megadit`.
    return {PARENT_VARIABLE: str(os.getpid()), "PYTHONSAFEPATH": "1"}


def follow_parent() -> None:
    """Have this process receive SIGTERM when the parent that started it dies (Linux; elsewhere nothing)."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if not psutil.pid_exists(int(parent)):  # it died before the call above
        sys.exit(f"megadit: error: process {parent}, which started this one, is gone")


@contextmanager
def forwarding(children: Callable[[], Sequence[psutil.Process]]) -> Iterator[None]:
    """Forward stop signals to `children()` while the body runs; a second Ctrl-C kills them.

    A signal that finds no child yet ends this process with exit code 130.
    """
    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        # A closed terminal asks for the same as SIGTERM: write a checkpoint and stop.
        sent = signal.SIGKILL if interrupts > 1 else signal.SIGTERM if number == signal.SIGHUP else number
        targets = children()
        if not targets:
            sys.exit(INTERRUPTED_WITH_NOTHING)
        for child in targets:
            with suppress(psutil.NoSuchProcess):  # it has ended by itself
                child.send_signal(sent)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run one child with `environment` added to ours, forward signals to it, and return its exit code."""
    started: list[psutil.Process] = []
    with forwarding(lambda: started):
        variables = {**os.environ, **environment, **child_environment()}
        child = subprocess.Popen(command, env=variables, start_new_session=True)
        started.append(psutil.Process(child.pid))
        return child.wait()


def wait_for_interrupt() -> None:
    """Return when Ctrl-C, SIGTERM or SIGHUP arrives."""
    arrived = threading.Event()
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: arrived.set())
    arrived.wait()
