"""`megadit bench memory`: what a rank holds on this machine's processors, beside what `planning/memory.py` predicts.

Each row is a new set of processes that train a few steps on synthetic data. Measured is the most resident memory of a
rank above what it held before its engine was built, and after a small model of the same family was trained: libraries
and code do not count. Linux only. glibc gives freed memory back at once here (MALLOC_MMAP_THRESHOLD_), as allocators of
GPUs would use it again.
"""

import gc
import multiprocessing
import os
import socket
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection

import torch

from megadit import engines, objectives, recipe as recipes
from megadit.benchmarks.findings import Cell, Table
from megadit.distributed import Topology, process_group
from megadit.exit_codes import DONE, end_now
from megadit.planning.memory import predict
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe
from megadit.training.ema import Averages
from megadit.training.peak_memory import peak_bytes, reset_peak

DEFAULTS = (  # 36 million parameters with the quickstart: states outweigh what does not shrink with the ranks
    "model.width=512",
    "training.num_images=8",
    "training.batch_size=8",
    "data.num_streams=8",
    "engine.reshard_after_forward=true",
)
# Name -> engine.kind, engine.num_replicas.
ENGINES = {"fsdp": ("fsdp", 1), "hsdp": ("fsdp", 2), "zero3": ("zero3", 1)}
TEXT_TOKENS = 16
NUM_STEPS = 3
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
MIB = 2**20
CPU = torch.device("cpu")
ITEMS = ("weights", "optimizer_state", "averages", "gradients", "gathered", "activations")


def bench_memory(source: str, overrides: Sequence[str], names: Sequence[str], ranks: Sequence[int]) -> Table:
    """All figures are in MiB, of the rank that holds most; `overrides` come after DEFAULTS.

    Raises ValueError for an engine that is not in ENGINES and what the recipe refuses.
    """
    rows: list[dict[str, Cell]] = []
    for name in names:
        if name not in ENGINES:
            raise ValueError(f"{name!r} is not one of {', '.join(ENGINES)}")
        kind, num_replicas = ENGINES[name]
        for num_ranks in ranks:
            if num_ranks % num_replicas:
                continue  # a replica needs a rank
            settings = (f"engine.kind={kind}", f"engine.num_replicas={num_replicas}", f"engine.num_ranks={num_ranks}")
            recipe = recipes.load(source, [*DEFAULTS, *overrides, *settings])
            predicted, found = predict(recipe, num_ranks, TEXT_TOKENS), max(measure(recipe))
            items: dict[str, Cell] = {item.replace("_", " "): round(getattr(predicted, item) / MIB) for item in ITEMS}
            totals: dict[str, Cell] = {"predicted": round(predicted.peak / MIB), "measured": round(found / MIB)}
            rows.append({"engine": name, "ranks": num_ranks, **items, **totals, "ratio": found / predicted.peak})
    return Table(f"memory of a rank of {source}, MiB", "what the formula predicts", rows)


def measure(recipe: Recipe) -> list[int]:
    """Bytes that each rank holds at most while it trains, in new processes."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    before = dict(os.environ)
    os.environ |= MALLOC | {"WORLD_SIZE": str(recipe.engine.num_ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes, answers = [], []
    try:
        for rank in range(recipe.engine.num_ranks):
            # Read when the process starts, as is all of the above.
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            answer, ours = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(recipe, ours))
            process.start()
            ours.close()
            processes.append(process)
            answers.append(answer)
        return [int(answer.recv()) for answer in answers]  # EOFError where a rank broke; it has said why
    finally:
        os.environ.clear()
        os.environ.update(before)
        for process in processes:
            process.join(timeout=30)
            process.kill()


def _rank(recipe: Recipe, answer: Connection) -> None:
    with process_group(needed=True, num_replicas=recipe.engine.num_replicas) as topology:
        _train(_small(recipe), topology)
        gc.collect()
        reset_peak(CPU)
        before = peak_bytes(CPU)
        _train(recipe, topology)
        answer.send(peak_bytes(CPU) - before)
        answer.close()
    end_now(DONE)  # gloo's threads abort the interpreter's ordinary shutdown now and then


def _small(recipe: Recipe) -> Recipe:
    """A model that takes the same code and next to no memory."""
    tree = recipe.model_dump(mode="json")
    tree["model"]["width"] = 2 * recipe.model.head_dim
    tree["parametrization"] = {"kind": "sp"}
    return recipes.parse(tree, "small")


def _train(recipe: Recipe, topology: Topology) -> None:
    engine = engines.build(recipe, topology)
    averages = Averages(engine.shards, recipe.training.ema_rates, recipe.training.ema_power_stds)
    objective = objectives.build(recipe.objective, recipe.model, CPU)
    size = recipe.training.micro_batch_size or recipe.training.batch_size // recipe.engine.num_ranks
    num_micro_batches = recipe.training.batch_size // recipe.engine.num_ranks // size
    batch = synthetic_batch(recipe, size, TEXT_TOKENS, CPU)
    loss = partial(objective.losses, batch=batch, timestep_B=objective.timesteps(batch.timestep_uniform))
    for step in range(1, NUM_STEPS + 1):
        engine.train_step([loss] * num_micro_batches, 1.0)
        averages.update(step)


def parse_ranks(numbers: str) -> list[int]:
    """`1,2` as [1, 2]. Raises ValueError for anything else."""
    parts = numbers.split(",")
    if wrong := [part for part in parts if not (part.isdecimal() and int(part))]:
        raise ValueError(f"--ranks takes whole numbers with commas between, not {wrong[0]!r}")
    return [int(part) for part in parts]
