"""What a run costs: where the time of a step goes, images, tokens and FLOPs per second, memory, corrupt samples.

Time is split by marks: `begin(phase)` ends the phase before it, so the phases add up to the time that passed. On a GPU
the marks are CUDA events, which cost no synchronisation until they are read; on a CPU they are readings of a clock.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megadit.batch import Batch
from megadit.distributed import Topology
from megadit.engines.base import LossClosure
from megadit.objectives import Losses
from megadit.planning.ceilings import device_name, peak_flops
from megadit.planning.flops import training_flops, training_tokens
from megadit.recipe import Recipe
from megadit.training.peak_memory import peak_bytes

# "backward" ends with the reduction of the gradients and of their norm, "optimizer" with the averages.
Phase = Literal["data", "forward", "backward", "optimizer", "checkpoint", "validation"]
PHASES: tuple[Phase, ...] = get_args(Phase)
STEP_PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "optimizer")
STALL_SHARE = 0.1  # of the computing time of a step: a longer wait for its data is a stall


@dataclass(frozen=True)
class Costs:
    """Of some steps, over all ranks. Rates count everything but validation."""

    num_steps: int
    images_per_second: float
    tokens_per_second: float
    flops_per_second: float  # model FLOPs of one rank
    mfu: float | None  # of the device's peak; None where that is unknown
    seconds: dict[Phase, float]  # of one step, the mean over steps and ranks
    data_stalls: int  # steps that waited for data, of the rank that waited most often
    peak_bytes: int  # of the rank that took most
    num_replaced: int  # samples that were corrupt, with another one's contents in their place


class Telemetry:
    """Collects on every rank; `take` is called by all ranks together."""

    def __init__(self, recipe: Recipe, topology: Topology, notice: Callable[[Phase], object]) -> None:
        self._model = recipe.model
        self._topology, self._device = topology, topology.device
        self._notice = notice  # is told every phase that begins
        self._peak_flops = peak_flops(device_name(self._device), recipe.training.precision)
        self._marks: list[tuple[Phase, Any]] = []
        self._counts = Counter[str]()

    def begin(self, phase: Phase) -> None:
        """End the phase that is on, and begin `phase`."""
        self._marks.append((phase, self._now()))
        self._notice(phase)

    def timed(self, loss: LossClosure) -> LossClosure:
        """`loss` as forward phase, followed by the backward phase."""

        def run(model: torch.nn.Module) -> Losses:
            self.begin("forward")
            losses = loss(model)
            self.begin("backward")
            return losses

        return run

    @contextmanager
    def watching_optimizers(self) -> Iterator[None]:
        """Begin the optimizer phase whenever an optimizer of this process begins a step, whichever engine has it."""

        def begin(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.begin("optimizer")

        handle = register_optimizer_step_pre_hook(begin)
        try:
            yield
        finally:
            handle.remove()

    def count(self, batch: Batch) -> None:
        """Take note of this rank's samples of one step."""
        lengths = batch.text_lengths.tolist()
        self._counts["steps"] += 1
        self._counts["images"] += len(batch)
        self._counts["tokens"] += training_tokens(self._model, lengths)
        self._counts["flops"] += training_flops(self._model, lengths)
        self._counts["replaced"] += int(batch.replaced.sum())

    def take(self) -> Costs:
        """What the steps since the last call cost. At least one was counted."""
        durations = self._durations()
        seconds = {phase: sum(durations[phase]) for phase in PHASES}
        computing = sum(seconds[phase] for phase in STEP_PHASES[1:]) / self._counts["steps"]
        stalls = sum(wait > STALL_SHARE * computing for wait in durations["data"])
        names = ("images", "tokens", "flops", "replaced")
        ours = [*(self._counts[name] for name in names), *seconds.values(), stalls, peak_bytes(self._device)]
        table = torch.zeros(self._topology.size, len(ours), dtype=torch.float64)
        table[self._topology.rank] = torch.tensor(ours, dtype=torch.float64)
        self._topology.sum(table)
        num_steps, self._counts = self._counts["steps"], Counter()

        means = dict(zip(PHASES, table[:, len(names) : -2].mean(0).tolist(), strict=True))
        elapsed = sum(means.values()) - means["validation"]
        images, tokens, flops, replaced = table[:, : len(names)].sum(0).tolist()
        flops_per_second = flops / elapsed / self._topology.size
        return Costs(
            num_steps=num_steps,
            images_per_second=images / elapsed,
            tokens_per_second=tokens / elapsed,
            flops_per_second=flops_per_second,
            mfu=flops_per_second / self._peak_flops if self._peak_flops else None,
            seconds={phase: means[phase] / num_steps for phase in PHASES},
            data_stalls=int(table[:, -2].max()),
            peak_bytes=int(table[:, -1].max()),
            num_replaced=int(replaced),
        )

    def _durations(self) -> dict[Phase, list[float]]:
        """Seconds of every stretch since the last call, by phase; the phase that is on begins anew."""
        assert self._marks, "no phase has begun"
        self._marks.append((self._marks[-1][0], self._now()))
        if self._device.type == "cuda":
            self._marks[-1][1].synchronize()
        durations: dict[Phase, list[float]] = {phase: [] for phase in PHASES}
        for (phase, start), (_, end) in pairwise(self._marks):
            passed = start.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - start
            durations[phase].append(passed)
        del self._marks[:-1]
        return durations

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
