"""How a process of ours ends: an expected error is one line and exit code 1, and ranks report each problem once.

Ranks that `megadit.launcher.local.launch` started leave their messages in a folder for it; it prints the first.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megadit.exit_codes import DONE, FAILED, end_now

FAILURES_VARIABLE = "MEGADIT_FAILURES"  # the folder of the ranks' messages
LOST_PEER = re.compile(r"gloo.*(Connection closed by peer|Connection reset by peer|Broken pipe)", re.DOTALL)


def run_reporting(command: Callable[[], object]) -> NoReturn:
    """Run `command` and end the process with its exit code.

    ValueError and OSError are what a user can cause: one line `megadit: error: ...`, exit code 1, no traceback unless
    MEGADIT_TRACEBACK=1. Anything else keeps its traceback.
    """
    try:
        command()
        code = DONE
    except SystemExit as request:
        if isinstance(request.code, str):
            print(request.code, file=sys.stderr)
        code = FAILED if isinstance(request.code, str) else request.code or DONE
    except Exception as error:
        _report(error)
        code = FAILED
    if "RANK" in os.environ:
        end_now(int(code))  # gloo's threads abort the interpreter's ordinary shutdown now and then
    sys.exit(code)


def end_with(error: Exception) -> NoReturn:
    """End the process from any thread, as `run_reporting` does when its command raises `error`."""
    _report(error)
    end_now(FAILED)


def first_failure(folder: Path) -> tuple[int, str] | None:
    """The rank that reported first and its message; None when no rank of `folder` has."""
    reports = [path for path in folder.iterdir() if path.name.isdigit()]
    if not reports:
        return None
    first = min(reports, key=lambda path: path.stat().st_mtime_ns)
    return int(first.name), first.read_text()


def _report(error: Exception) -> None:
    lost_peer = _is_lost_peer(error)
    expected = isinstance(error, ValueError | OSError) or lost_peer
    message = " ".join(str(error).split())
    if lost_peer:
        message = f"lost the connection to another rank: {message}"
    elif not expected:
        message = f"{type(error).__name__}: {message} (its traceback is above)"
    if not expected or os.environ.get("MEGADIT_TRACEBACK") == "1":
        traceback.print_exc()

    rank, folder = os.environ.get("RANK"), os.environ.get(FAILURES_VARIABLE)
    if rank is not None and folder is not None:
        if lost_peer:  # the launcher sees for itself how the other one ended
            return
        try:
            (Path(folder) / rank).write_text(message)
            return
        except OSError as full_disk:
            message = f"{message} ({full_disk})"
    print(f"megadit: error: {f'rank {rank}: ' if rank is not None else ''}{message}", file=sys.stderr)


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank ended, which then is the one with something to say."""
    return isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) is not None
