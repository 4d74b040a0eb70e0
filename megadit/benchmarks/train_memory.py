"""`megadit bench memory`: what a rank holds on this machine's processors, beside what `planning/memory.py` predicts.

Each row is a new set of processes that train a few steps on synthetic data, save and validate where the recipe does.
Measured is the most resident memory of a rank above what it held before its engine was built, and after a small model
of the same family was trained: libraries and code do not count. Linux only. glibc is told to give freed memory back at
once, as allocators of GPUs would use it again.
"""

import ctypes
import gc
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from megadit import engines, objectives, recipe as recipes
from megadit.benchmarks.findings import Cell, Table
from megadit.distributed import Topology, process_group
from megadit.engines.base import Engine, LossClosure, replaced_weights
from megadit.exit_codes import DONE, end_now
from megadit.launcher.forked import fork_server
from megadit.planning.memory import predict
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe
from megadit.training.checkpoint import Saver
from megadit.training.ema import Averages
from megadit.training.online import OnlineEncoders, encoder_dtype
from megadit.training.peak_memory import peak_bytes, reset_peak

DEFAULTS = (  # 36 million parameters with the quickstart: states outweigh what does not shrink with the ranks
    "model.width=512",
    "training.num_images=8",
    "training.batch_size=8",
    "data.num_streams=8",
    "engine.reshard_after_forward=true",
    "checkpoints.asynchronous=false",
    "validation=null",
)
TEXT_TOKENS = 16
NUM_STEPS = 3
MIB = 2**20
CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
GIVE_BACK_BYTES = 2**17

# Name -> engine.kind, engine.num_replicas.
ENGINES = {
    "single": ("single", 1),
    "fsdp": ("fsdp", 1),
    "hsdp": ("fsdp", 2),
    "zero1": ("zero1", 1),
    "zero2": ("zero2", 1),
    "zero3": ("zero3", 1),
}
_FSDP, _ZERO = ("fsdp", "hsdp"), ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Option:
    """Settings that change what a rank holds, and the engines that have them."""

    overrides: tuple[str, ...]
    engines: Sequence[str] = tuple(ENGINES)


_MANY = (  # activations outweigh the rest
    "model.width=256",
    "model.depth=8",
    "parametrization.base_shapes=null",
    "parametrization.base_width=128",
    "training.batch_size=64",
    "training.num_images=64",
)
_AGAIN = "engine.activation_checkpointing="
OPTIONS: Mapping[str, Option] = {
    "plain": Option(()),
    "bf16": Option(("training.precision=bf16",)),
    "kept-gathered": Option(("engine.reshard_after_forward=false",), _FSDP),
    "micro-batches": Option(("training.micro_batch_size=1",)),
    "micro-batches-bf16": Option(("training.micro_batch_size=1", "training.precision=bf16")),
    "whole-gradients": Option(("training.micro_batch_size=1", "engine.accumulation=whole"), _FSDP),
    "three-averages": Option(("training.ema_rates=[0.9,0.99]", "training.ema_power_stds=[0.1]")),
    "many": Option(_MANY),
    "many-bf16": Option((*_MANY, "training.precision=bf16")),
    "many-full": Option((*_MANY, _AGAIN + "full")),
    "many-every-third": Option((*_MANY, _AGAIN + "3")),
    "many-selective": Option((*_MANY, _AGAIN + "selective")),
    "optimizer-offloaded": Option(("engine.cpu_offload=optimizer",), _ZERO),
    "all-offloaded": Option(("engine.cpu_offload=all",), (*_FSDP, "zero3")),
    "saving": Option(("checkpoints.asynchronous=true",)),
    "validating": Option(("validation={every_images: 8, batch_size: 8}",)),
    "text-encoder": Option(("encoders={text: minilm}",)),
    "text-encoder-sharded": Option(("encoders={text: minilm, sharded: true}",), (*_FSDP, *_ZERO)),
}


def bench_memory(
    source: str, overrides: Sequence[str], names: Sequence[str], ranks: Sequence[int], options: Sequence[str]
) -> Table:
    """All figures are in MiB, of the rank that holds most; `overrides` come after DEFAULTS and before the options'.

    Raises ValueError for an engine that is not in ENGINES, an option that is not in OPTIONS, and what the recipe
    refuses.
    """
    _require_known(names, ENGINES)
    _require_known(options, OPTIONS)
    rows = [
        _row(source, overrides, name, option, num_ranks)
        for name in names
        for option in options
        for num_ranks in ranks
        if name in OPTIONS[option].engines
        if num_ranks % ENGINES[name][1] == 0  # a replica needs a rank
        if name != "single" or num_ranks == 1
    ]
    return Table(f"memory of a rank of {source}, MiB", "what the formula predicts", rows)


def _row(source: str, overrides: Sequence[str], name: str, option: str, num_ranks: int) -> dict[str, Cell]:
    kind, num_replicas = ENGINES[name]
    settings = (f"engine.kind={kind}", f"engine.num_replicas={num_replicas}", f"engine.num_ranks={num_ranks}")
    recipe = recipes.load(source, [*DEFAULTS, *overrides, *settings, *OPTIONS[option].overrides])
    predicted = predict(recipe, num_ranks, TEXT_TOKENS, on_cpu=True).total_peak
    found = max(measure(recipe))
    beside: dict[str, Cell] = {"predicted": round(predicted / MIB), "measured": round(found / MIB)}
    return {"engine": name, "option": option, "ranks": num_ranks, **beside, "ratio": found / predicted}


def _require_known(names: Sequence[str], known: Mapping[str, object]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(known)}")


def measure(recipe: Recipe) -> list[int]:
    """Bytes that each rank holds at most while it trains, in new processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(recipe.engine.num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = fork_server()
    processes, answers = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(recipe.engine.num_ranks):
                answer, ours = context.Pipe(duplex=False)
                environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = context.Process(target=_rank, args=(recipe, environment, Path(folder), ours))
                process.start()
                ours.close()
                processes.append(process)
                answers.append(answer)
            return [int(answer.recv()) for answer in answers]  # EOFError where a rank broke; it has said why
        finally:
            for process in processes:
                process.join(timeout=30)
                process.kill()


def _rank(recipe: Recipe, environment: Mapping[str, str], folder: Path, answer: Connection) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, GIVE_BACK_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, GIVE_BACK_BYTES)
    with process_group(needed=True, num_replicas=recipe.engine.num_replicas) as topology:
        _train(_small(recipe), topology, folder / "small")
        gc.collect()
        reset_peak(CPU)
        before = peak_bytes(CPU)
        _train(recipe, topology, folder / "run")
        answer.send(peak_bytes(CPU) - before)
        answer.close()
    end_now(DONE)  # gloo's threads abort the interpreter's ordinary shutdown now and then


def _small(recipe: Recipe) -> Recipe:
    """A model that takes the same code and next to no memory."""
    tree = recipe.model_dump(mode="json")
    tree["model"]["width"] = 2 * recipe.model.head_dim
    tree["parametrization"] = {"kind": "sp"}
    tree["encoders"] = None
    return recipes.parse(tree, "small")


def _train(recipe: Recipe, topology: Topology, run: Path) -> None:
    """A few steps, with a checkpoint after the first and a validation at the end where the recipe asks for them."""
    encoders = OnlineEncoders(recipe.encoders, recipe, topology) if recipe.encoders else None
    engine = engines.build(recipe, topology)
    averages = Averages(engine.shards, recipe.training.ema_rates, recipe.training.ema_power_stds)
    size = recipe.training.micro_batch_size or recipe.training.batch_size // recipe.engine.num_ranks
    num_micro_batches = recipe.training.batch_size // recipe.engine.num_ranks // size
    losses = [_loss(recipe, size, encoders)] * num_micro_batches
    with ExitStack() as stack:
        saver = Saver(run, recipe, engine, averages) if recipe.checkpoints.asynchronous else None
        if saver is not None:
            stack.enter_context(saver)
        for step in range(1, NUM_STEPS + 1):
            engine.train_step(losses, 1.0)
            averages.update(step)
            if saver is not None and step == 1:
                saver.save(recipe.training.batch_size, 1)
        if recipe.validation:
            _validate(engine, averages, _loss(recipe, recipe.validation.batch_size, encoders))


def _validate(engine: Engine, averages: Averages, loss: LossClosure) -> None:
    engine.evaluate(loss)
    for values in averages.by_name().values():
        with replaced_weights(engine, values):
            engine.evaluate(loss)


def _loss(recipe: Recipe, size: int, encoders: OnlineEncoders | None) -> LossClosure:
    objective = objectives.build(recipe.objective, recipe.model, CPU, encoder_dtype(recipe))
    batch = synthetic_batch(recipe, size, TEXT_TOKENS, CPU)
    if encoders is not None:
        captions = ("a picture of something " * TEXT_TOKENS,) * size
        batch = encoders.encode_training(replace(batch, captions=captions), size)
    return partial(objective.losses, batch=batch, timestep_B=objective.timesteps(batch.timestep_uniform))


def parse_ranks(numbers: str) -> list[int]:
    """`1,2` as [1, 2]. Raises ValueError for anything else."""
    parts = numbers.split(",")
    if wrong := [part for part in parts if not (part.isdecimal() and int(part))]:
        raise ValueError(f"--ranks takes whole numbers with commas between, not {wrong[0]!r}")
    return [int(part) for part in parts]
