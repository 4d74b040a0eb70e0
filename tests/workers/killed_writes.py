"""Saves a checkpoint over and over, on forked ranks of which one kills itself before its n-th file operation."""

import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from megadit import engines
from megadit.distributed import ALONE, process_group
from megadit.recipe import Recipe
from megadit.training import checkpoint
from megadit.training.ema import Averages

Found = tuple[str, tuple[float, ...], list[str]]  # the operation, the values in the newest checkpoint, what is there
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
NOBODY = -1


class Saves:
    """Saves of a run by ranks that each have the whole state, of which they share the writing."""

    def __init__(self, recipe: Recipe, num_ranks: int) -> None:
        self._recipe, self._num_ranks = recipe, num_ranks
        self._engine = engines.build(recipe, ALONE)
        self._averages = Averages(self._engine.shards, [0.9])

    def save(self, run: Path, value: int, victim: int = NOBODY, kill_point: int = NOBODY) -> list[str]:
        """A checkpoint in which all is `value`. Returns the file operations of rank `victim`, to the last before it
        died."""
        log = run / "operations"

        def save() -> None:
            if int(os.environ["RANK"]) == victim:
                die_before(kill_point, run / "checkpoints", log)
            for name, shard in self._engine.shards.items():
                average = self._averages.by_name()["ema_0.9"][name]
                for values in (shard.values, average, *self._engine.optimizer_state()[name].values()):
                    values.fill_(value)
            with (
                process_group(needed=False) as self._engine.topology,
                checkpoint.Saver(run, self._recipe, self._engine, self._averages) as saver,
            ):
                saver.save(images_seen=16 * value, num_steps=value)

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        children = [fork(save, rank, self._num_ranks, port) for rank in range(self._num_ranks)]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if kill_point != NOBODY:
            assert os.WIFSIGNALED(statuses[victim]), statuses
        return log.read_text().splitlines() if victim != NOBODY else []


def main(recipe: Recipe, run: Path, saving_ranks: int, victim: int, num_others: int) -> list[Found]:
    """Kills before every operation that makes or renames a file or removes a folder, and before some of the others."""
    saves = Saves(recipe, saving_ranks)
    first, dry = run.with_name("one checkpoint"), run.with_name("two checkpoints")
    saves.save(first, 1)
    shutil.copytree(first, dry)
    operations = saves.save(dry, 2, victim)
    others = [
        number
        for number, operation in enumerate(operations)
        if operation.startswith(("write", "os.fsync", "os.remove"))
    ]
    points = {*range(len(operations))} - {*others} | {*random.Random(0).sample(others, num_others)}
    found = []
    for point in sorted(points):
        shutil.copytree(first, run)
        operation = saves.save(run, 2, victim, point)[-1]
        newest = checkpoint.newest_valid(run / "checkpoints")
        values = {value for kind in ("weight", "ema_0.9") for value in values_in(newest, kind)}
        saves.save(run, 3)  # what is left is in nobody's way
        found.append((operation, tuple(values), sorted(path.name for path in (run / "checkpoints").iterdir())))
        shutil.rmtree(run)
    return found


def values_in(path: Path, kind: str) -> list[float]:
    tensors = checkpoint.read_tensors(path, kind).values()
    return torch.cat([tensor.flatten() for tensor in tensors]).unique().tolist()


def fork(function: Callable[[], None], rank: int, world_size: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
    try:
        function()
    except Exception as error:  # of a rank whose peer was killed
        sys.stderr.write(f"rank {rank}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(0)


def die_before(number: int, folder: Path, log: Path) -> None:
    """Kill this process before operation `number` on files of `folder`; a write is two, the second in its middle."""
    numbers = count()
    notes = log.open("wb", buffering=0)

    def operate(operation: str) -> None:
        notes.write(f"{operation}\n".encode())
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        path = Path(str(arguments[0])) if arguments else Path()
        creates = event == "open" and arguments[1] in ("w", "wb")
        # rmtree removes by name, relative to an open folder
        if (creates or event in CHANGES) and (path.is_relative_to(folder) or not path.is_absolute()):
            operate(f"{event} {path.name}")

    write, sync = os.pwrite, os.fsync

    def write_in_two(descriptor: int, data: memoryview, start: int) -> int:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        operate(f"write {name}")
        written = write(descriptor, data[: len(data) // 2], start)
        operate(f"write the rest of {name}")
        return written + write(descriptor, data[len(data) // 2 :], start + written)

    def noted_sync(descriptor: int) -> None:
        operate("os.fsync")
        sync(descriptor)

    os.pwrite, os.fsync = write_in_two, noted_sync
    sys.addaudithook(audit)
