"""A run that hangs ends with a message that names the rank and the step, instead of waiting in silence for ever.

Every rank tells the others, through the store that they met at, how far it has come: in a thread, because the main one
may hang in a collective. A rank where nothing moved for the allowed time looks who is furthest behind, and ends.
"""

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megadit.distributed import Topology

logger = logging.getLogger(__name__)
STORE_SECONDS = 5.0  # the store is memory of one process: later it does not answer at all


@dataclass(frozen=True)
class Beat:
    """What a rank last told: how many marks it has passed, what it was doing, and signs of life in the midst of it."""

    marks: int
    step: int
    phase: str
    signs: int
    number: int  # of the beat: a process that is frozen sends no more

    def describe(self) -> str:
        return f"in the {self.phase} of step {self.step}"


class Watchdog:
    """Calls `end` with a TimeoutError when this rank has passed no mark for `limit` seconds.

    Something long that goes on gives signs of life; they count for all ranks, of which the others wait for this one.
    Python stacks go to FOLDER/stack-rank-N.txt at half of that time, so that those of all ranks are there.
    Time in which the whole process was frozen (a debugger, a suspended job) does not count.
    """

    def __init__(
        self, limit: float, folder: Path, end: Callable[[Exception], object], topology: Topology, stage: int = 0
    ) -> None:
        self._limit = limit
        self._folder = folder
        self._end = end
        self._topology = topology
        self._stage = stage
        self._interval = min(limit / 10, 5.0)
        self._silence = 0.0
        self._beat = Beat(0, 0, "start", 0, 0)
        self._others: dict[int, tuple[Beat, float]] = {}  # the last beat of each rank, and when a new one was seen
        self._signs_of_others = 0
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._watch, self._talk)]

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(STORE_SECONDS)

    def mark(self, step: int | None = None, phase: str | None = None) -> None:
        """Something moved: `phase` of `step` has begun, or goes on where they are not given."""
        last = self._beat
        step = last.step if step is None else step
        self._beat = replace(last, marks=last.marks + 1, step=step, phase=phase or last.phase)

    def alive(self) -> None:
        """A sign of life: this rank goes on with something of which others do less, or nothing.

        Unlike marks, signs are not compared between ranks. They must come at least every fifth of the limit.
        """
        self._beat = replace(self._beat, signs=self._beat.signs + 1)

    def _watch(self) -> None:
        """Count the silence by ticks of the clock, and end at the limit."""
        warned, heard, last = False, self._heard(), time.monotonic()
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            self._silence = self._silence + min(now - last, 2 * self._interval) if self._heard() == heard else 0.0
            heard, last = self._heard(), now
            if self._silence < self._limit / 2:
                warned = False
            elif not warned:
                warned = True
                self._write_stacks()
            if self._silence >= self._limit:
                self._end(TimeoutError(self._verdict()))
                return

    def _heard(self) -> tuple[int, int, int]:
        return self._beat.marks, self._beat.signs, self._signs_of_others

    def _talk(self) -> None:
        """Tell the others; ask them when this rank hears nothing from itself."""
        if self._topology.size == 1:
            return
        try:
            store = _own_connection(self._stage)
            for number in range(1, 2**62):
                beat = self._beat
                store.set(f"{self._topology.rank}", json.dumps([beat.marks, beat.step, beat.phase, beat.signs, number]))
                if self._silence >= self._limit / 4:
                    self._ask(store)
                if self._stopped.wait(self._interval):
                    return
        except dist.DistError as error:  # its process has ended, or is frozen: `_verdict` says so
            logger.debug("the ranks' store does not answer: %s", error)

    def _ask(self, store: dist.Store) -> None:
        for other in range(self._topology.size):
            if other != self._topology.rank and store.check([f"{other}"]):
                beat = Beat(*json.loads(store.get(f"{other}")))
                last, _ = self._others.get(other, (None, 0.0))
                if last is None or last.number != beat.number:
                    self._others[other] = beat, time.monotonic()
                if last is not None and last.signs != beat.signs:
                    self._signs_of_others += 1

    def _verdict(self) -> str:
        """Which rank is to blame: one that sends no more, else the one with the fewest marks."""
        rank = self._topology.rank
        limit = f"{self._limit:g} s (training.stall_seconds)"
        where = f"Python stacks are in {self._folder}"
        now = time.monotonic()
        for other, (beat, seen) in sorted(self._others.items()):
            if now - seen > self._limit / 4:
                return f"rank {other} gives no sign of life, last {beat.describe()}; waited {limit}; {where}"
        if missing := [other for other in range(self._topology.size) if other not in {rank, *self._others}]:
            return (
                f"rank {rank} has waited for {limit} {self._beat.describe()}, and rank {missing[0]} does not answer; "
                f"{where}"
            )
        beats = {rank: self._beat} | {other: beat for other, (beat, _) in self._others.items()}
        fewest = min(beat.marks for beat in beats.values())
        behind = [number for number, beat in sorted(beats.items()) if beat.marks == fewest]
        who = f"rank {behind[0]} hangs" if len(behind) < len(beats) or len(beats) == 1 else "all ranks hang"
        return f"{who} {beats[behind[0]].describe()}: nothing moved for {limit}; {where}"

    def _write_stacks(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"stack-rank-{self._topology.rank}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file)
        logger.warning(
            "rank %d: nothing has moved for %.0f s %s; stacks: %s",
            self._topology.rank,
            self._silence,
            self._beat.describe(),
            path,
        )


def _own_connection(stage: int) -> dist.Store:
    """The ranks' store through a connection of its own: a wait in the main thread must not block this one."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=STORE_SECONDS)
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    # torchrun keeps one store over restarts: what the ranks said before one, or in the stage before this one, must not
    # be taken for the present.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"megadit-watchdog-{start}-{stage}", store)
