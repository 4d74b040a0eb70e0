"""`megadit plan --trace`: the real engine takes a real step as one of any number of ranks, without memory or network.

The process group is torch's fake one, whose collectives do nothing; tensors have no memory, so 18 billion parameters on
1024 ranks take seconds and less than 2 GB. What comes out is what the engine asks for, not how long it takes. Tensors
are those of a CPU: kernels of a GPU keep less in some places (GELU), and blocks are not compiled.
"""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megadit import engines, objectives
from megadit.distributed import Axis as Ranks, Topology
from megadit.objectives import Losses
from megadit.planning import collectives
from megadit.planning.collectives import Axis, Calls, Collective, Kind, by_size
from megadit.planning.flops import step_flops
from megadit.planning.memory import predict
from megadit.planning.synthetic_batch import longest_text, synthetic_batch
from megadit.planning.without_memory import Recorder
from megadit.recipe import Recipe, check_world_size

MOST_TRACED = 3  # micro-batches: the first, one of the middle, which count for all of them, and the last


@dataclass(frozen=True)
class Traced:
    """What rank 0 does in one optimizer step."""

    collectives: tuple[Collective, ...]  # largest messages first
    flops: int
    peak_bytes: int  # at most at once, with the states of training and its averages
    seconds: float  # that tracing took


@dataclass(frozen=True)
class Figure:
    """One figure by formula and as traced."""

    what: str
    unit: str  # "calls", "bytes", "FLOP"
    formula: int
    traced: int

    @property
    def difference(self) -> float:
        """Of the formula, relative to what was traced."""
        return self.formula / self.traced - 1 if self.traced else float(self.formula != 0)


def compare(recipe: Recipe, num_ranks: int, text_tokens: int | None = None) -> list[Figure]:
    """The formulas beside a trace, of training alone: without validation and encoders that run beside it.

    Raises ValueError for what cannot be traced or has no formula.
    """
    tokens = longest_text(recipe.model) if text_tokens is None else text_tokens
    formula = collectives.collectives(recipe, num_ranks)
    alone = recipe.model_copy(update={"encoders": None, "validation": None})
    memory = predict(alone, num_ranks, tokens)
    traced = trace(recipe, num_ranks, tokens)
    by_formula, as_traced = _sums(formula), _sums(traced.collectives)
    return [
        *(Figure(*key, by_formula[key], as_traced[key]) for key in dict.fromkeys((*by_formula, *as_traced))),
        Figure("FLOPs", "FLOP", step_flops(recipe, num_ranks, tokens).computed, traced.flops),
        Figure("peak of memory", "bytes", memory.peak, traced.peak_bytes),
    ]


def _sums(found: Iterable[Collective]) -> Counter[tuple[str, str]]:
    """Calls and bytes by kind and axis."""
    sums: Counter[tuple[str, str]] = Counter()
    for one in found:
        sums[f"{one.kind} over {one.axis}", "calls"] += one.num_calls
        sums[f"{one.kind} over {one.axis}", "bytes"] += one.num_bytes
    return sums


def trace(recipe: Recipe, num_ranks: int, text_tokens: int | None = None) -> Traced:
    """One optimizer step of one of `num_ranks` ranks, traced in a process of its own.

    Captions have `text_tokens` tokens, by default the most that the model takes. Raises ValueError for what cannot be
    traced.
    """
    _require_traceable(recipe, num_ranks)
    context = multiprocessing.get_context("spawn")  # a fork would have this process's threads and process group
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(recipe, num_ranks, text_tokens, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        result = answer.recv()
    except EOFError:
        raise RuntimeError("the process that traces ended without a result") from None
    finally:
        process.kill()
        process.join()
    if isinstance(result, ValueError):
        raise result
    assert isinstance(result, Traced)
    return result


def _require_traceable(recipe: Recipe, num_ranks: int) -> None:
    engine = recipe.engine
    if engine.kind not in ("single", "fsdp"):
        raise ValueError(
            f"engine.kind {engine.kind} cannot be traced: DeepSpeed compares numbers of its ranks, which need memory"
        )
    if engine.cpu_offload != "none":
        raise ValueError("engine.cpu_offload cannot be traced: tensors without memory are all of one device; use none")
    if engine.kind == "single" and num_ranks > 1:
        raise ValueError(f"engine.kind single runs on one rank, not {num_ranks}; use another engine.kind")
    if num_ranks % engine.num_replicas:
        raise ValueError(f"engine.num_replicas {engine.num_replicas} does not divide the {num_ranks} ranks")
    check_world_size(recipe, num_ranks)


def _answer(recipe: Recipe, num_ranks: int, text_tokens: int | None, answer: Connection) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # not asked for before
    try:
        answer.send(trace_here(recipe, num_ranks, text_tokens))
    except ValueError as error:  # raised again by who asked; of any other the traceback is printed
        answer.send(ValueError(str(error)))


@dataclass(frozen=True)
class _Part:
    """What a micro-batch adds, and the last one the update, too."""

    calls: Calls
    flops: int


def trace_here(recipe: Recipe, num_ranks: int, text_tokens: int | None = None) -> Traced:
    """`trace` in this process, which must not be a rank of anything."""
    start = time.monotonic()
    sharded = recipe.engine.kind != "single"
    num_replicas = recipe.engine.num_replicas
    topology = Topology(Ranks(0, num_replicas), Ranks(0, num_ranks // num_replicas), joined=sharded)
    if sharded:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        recorder = Recorder(_axis_of(topology))
        with recorder:
            parts = _step(recipe, topology, text_tokens, recorder)
    finally:
        if sharded:
            dist.destroy_process_group()
    calls: Calls = Counter()
    for part, times in parts:
        for call, number in part.calls.items():
            calls[call] += times * number
    flops = sum(times * part.flops for part, times in parts)
    return Traced(tuple(by_size(calls)), flops, recorder.peak_bytes, time.monotonic() - start)


def _axis_of(topology: Topology) -> Callable[[Kind, str], Axis]:
    """Over which ranks a collective goes, by its kind and the name of its process group.

    Without replicas the ranks that shard a model are all there are, and both have one group: sums are over all.
    """
    if not topology.joined:
        return lambda kind, group: "all"
    mesh = topology.mesh  # made here, where the ranks in it have memory
    if topology.replicate.size == 1:
        return lambda kind, group: "all" if kind == "all_reduce" else "shard"
    axes: dict[str, Axis] = {mesh.get_group(axis).group_name: axis for axis in ("replicate", "shard")}
    every = dist.group.WORLD
    assert every is not None, "the ranks have joined"
    axes[every.group_name] = "all"  # where each replica is one rank, they are all ranks
    return lambda kind, group: axes[group]


def _step(recipe: Recipe, topology: Topology, text_tokens: int | None, recorder: Recorder) -> list[tuple[_Part, int]]:
    """What the micro-batches of a step add, and how many are like each."""
    engine = engines.build(_eager(recipe), topology)
    objective = objectives.build(recipe.objective, recipe.model, engine.device)
    training = recipe.training
    num_averages = len(training.ema_rates) + len(training.ema_power_stds)
    averages = [shard.values.clone() for shard in engine.shards.values() for _ in range(num_averages)]
    samples = training.batch_size // topology.size
    size = training.micro_batch_size or samples
    times = _times(samples // size)
    batch = synthetic_batch(recipe, size, text_tokens, engine.device)
    timestep_B = objective.timesteps(batch.timestep_uniform)
    before: list[tuple[Calls, int]] = []

    def losses(model: nn.Module) -> Losses:
        before.append((recorder.calls.copy(), recorder.flops))
        return objective.losses(model, batch, timestep_B)

    recorder.peak_bytes = recorder.live_bytes
    engine.train_step([losses] * len(times), 1.0)
    del averages  # they were there until now
    ends = [*before[1:], (recorder.calls, recorder.flops)]
    parts = [_Part(end[0] - start[0], end[1] - start[1]) for start, end in zip(before, ends, strict=True)]
    return list(zip(parts, times, strict=True))


def _times(num_micro_batches: int) -> list[int]:
    """For each micro-batch that is traced, how many it stands for."""
    if num_micro_batches <= MOST_TRACED:
        return [1] * num_micro_batches
    return [1, num_micro_batches - 2, 1]


def _eager(recipe: Recipe) -> Recipe:
    """Blocks cannot be compiled while their operations are watched."""
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"compile": False})})
