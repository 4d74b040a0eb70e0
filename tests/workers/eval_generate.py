"""Generation on forked ranks, one of which kills itself before its n-th file operation; and a run to generate from."""

import os
import signal
import socket
import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch

from megadit.distributed import process_group
from megadit.eval.task_images import Options, generate
from megadit.eval.tasks.benchmarks import TaskOptions, load_task
from megadit.eval.tasks.task import Task
from megadit.recipe import Recipe, parse

CPU = torch.device("cpu")
Attempt = tuple[int, int | None, int]  # ranks, which one is killed, before which of its operations


def class_recipe(data: Path, objective: str) -> Recipe:
    """A model of eight classes that samples in milliseconds."""
    sizes = {"input_size": 16, "in_channels": 3, "patch_size": 4, "width": 32, "depth": 1, "head_dim": 16}
    return parse(
        {
            "name": f"classes-{objective}",
            "model": {"family": "dit", "num_classes": 8, "learn_sigma": objective == "ddpm", **sizes},
            "parametrization": {"kind": "sp"},
            "objective": {"kind": objective},
            "data": {"url": str(data)},
            "optimizer": {"lr": 0.01},
            "training": {"num_images": 64, "batch_size": 16, "ema_rates": [0.5]},
            "checkpoints": {"every_images": 32},
        }
    )


def main(
    run: Path, prompts: Path, images_per_prompt: int, out: Path, attempts: list[Attempt], options: dict[str, Any]
) -> list[bool]:
    """Whether each attempt came to its end."""
    task = load_task("prompts", TaskOptions(prompts, images_per_prompt=images_per_prompt))
    return [_attempt(run, task, out, attempt, Options(**options)) for attempt in attempts]


def _attempt(run: Path, task: Task, out: Path, attempt: Attempt, options: Options) -> bool:
    num_ranks, victim, point = attempt
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_PORT": str(port)}
            if rank == victim:
                _die_before(point)
            _run_rank(run, task, out, options)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if victim is not None:
        assert os.WIFSIGNALED(statuses[victim]), statuses
    return not any(statuses)


def _run_rank(run: Path, task: Task, out: Path, options: Options) -> None:
    status = 1
    try:
        with process_group(needed=False) as topology:
            generate(task, run, out, options, topology)
        status = 0
    except Exception as error:  # of a rank whose peer was killed
        sys.stderr.write(f"{error}\n")
    finally:
        sys.stderr.flush()
        os._exit(status)


def _die_before(point: int) -> None:
    """Kill this process before the operation with that number: to sync a file, or to give it its final name."""
    numbers = count()
    sync, replace = os.fsync, os.replace

    def checked(function: Any) -> Any:
        def operate(*arguments: Any) -> Any:
            if next(numbers) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return operate

    os.fsync, os.replace = checked(sync), checked(replace)
