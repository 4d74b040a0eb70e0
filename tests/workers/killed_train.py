"""Trains on forked ranks, of which one kills itself at a step or while a checkpoint is written."""

import os
import runpy
import signal
import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from megadit.batch import Batch
from megadit.data.loading.loader import Loader
from megadit.recipe import Recipe
from megadit.training import trainer

killed_writes = runpy.run_path(str(Path(__file__).with_name("killed_writes.py")))


def main(recipe: Recipe, run: Path, victim: int, kind: str, point: int) -> bool:
    """Begin or continue a run. The rank `victim` dies before its batch (`kind` is "step") or file operation number
    `point`, counted from 0, and the others with it. Returns whether it did: the run can end before."""

    def work() -> None:
        if int(os.environ["RANK"]) == victim:
            if kind == "operation":
                killed_writes["die_before"](point, run / "checkpoints", run.with_name("operations"))
            else:
                die_before_step(point)
        trainer.train(recipe, run)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    num_ranks = recipe.engine.num_ranks
    ranks = {killed_writes["fork"](work, rank, num_ranks, port) for rank in range(num_ranks)}
    killed = False
    while ranks:
        child, status = os.wait()
        ranks.remove(child)
        if os.WIFSIGNALED(status) and not killed:
            killed = True
            for other in ranks:  # as a launcher does when one is dead
                os.kill(other, signal.SIGKILL)
    return killed


def die_before_step(number: int) -> None:
    """Kill this process when it asks for its batch `number`."""
    iterate = Loader.iterate

    def dying(stream: Loader, *arguments: Any) -> Iterator[Batch]:
        numbers = count()
        for batch in iterate(stream, *arguments):
            if next(numbers) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    Loader.iterate = dying  # type: ignore[method-assign]
