"""`megadit train` on ranks that are forked from a server which has the trainer imported: for many short runs.

They do what those of `launcher.local` do; only their start is quicker, a tenth of a second instead of several.
"""

import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from megadit.exit_codes import DONE
from megadit.launcher.failures import run_reporting
from megadit.launcher.local import rank_environment

_PRELOADED = ["megadit.training.trainer", "megadit.engines.fsdp", "megadit.launcher.forked", "torch._dynamo"]
_ERROR = "megadit: error: "  # as launcher/failures.py reports it


class ForkedRanks:
    """The ranks of one run of `source` with `overrides` in the folder `run`; they write to RUN.log, beside it.

    A context: ranks that are left at its end are killed.
    """

    def __init__(self, num_ranks: int, source: str, overrides: Sequence[str], run: Path) -> None:
        self._log = run.with_name(f"{run.name}.log")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        common = {**os.environ, **rank_environment(num_ranks)}
        joining = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._ranks: list[ForkServerProcess] = []
        for rank in range(num_ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), **joining} if num_ranks > 1 else {}
            arguments = (source, tuple(overrides), run, self._log, {**common, **place})
            self._ranks.append(fork_server().Process(target=_main, args=arguments))
        for process in self._ranks:
            process.start()

    def __enter__(self) -> "ForkedRanks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all ranks at once."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()

    def has_ended(self) -> bool:
        """Whether a rank has."""
        return any(process.exitcode is not None for process in self._ranks)

    def finish(self) -> None:
        """Wait for all ranks. When one does not end well, kills the others and raises ValueError with what it said."""
        running = self._ranks
        while running:
            wait([process.sentinel for process in running])
            failed = next((process.exitcode for process in self._ranks if process.exitcode), DONE)
            if failed != DONE:
                self.kill()
                raise ValueError(self._failure(failed))
            running = [process for process in self._ranks if process.exitcode is None]

    def _failure(self, exit_code: int) -> str:
        if not self._log.exists():
            return f"exit code {exit_code}, before it could write anything"
        said = self._log.read_text(errors="replace").splitlines()
        errors = [line.removeprefix(_ERROR) for line in said if line.startswith(_ERROR)]
        return next(iter(errors), f"exit code {exit_code}: {' / '.join(said[-3:])}")


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Whose processes have the trainer and the engines imported when they start."""
    import torch

    preloaded = list(_PRELOADED)
    if not torch.cuda.is_available():  # on a GPU, DeepSpeed's import would start CUDA before the fork, which breaks it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        preloaded.append("megadit.engines.zero")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded)
    return context


def _main(source: str, overrides: Sequence[str], run: Path, log: Path, environment: Mapping[str, str]) -> None:
    os.environ.clear()  # the fork server keeps the environment of its own start
    os.environ.update(environment)
    import torch

    from megadit.launcher.train import train

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    run_reporting(lambda: sys.exit(train(source, overrides, run)))
