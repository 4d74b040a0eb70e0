"""How a process of ours ends."""

import os
import sys
from typing import NoReturn

DONE = 0
FAILED = 1
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: with a checkpoint; the same command goes on
INTERRUPTED_WITH_NOTHING = 130  # as a shell reports SIGINT: there was nothing to save


def end_now(code: int) -> NoReturn:
    """End the process, from any of its threads and without the interpreter's shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
