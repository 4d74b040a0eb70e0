"""Two pieces of work timed beside each other: what benchmarks measure ratios with."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARMUP_PAIRS = 2


@dataclass(frozen=True)
class Pairs:
    """Seconds of a first and of a second piece of work, side by side."""

    seconds: list[tuple[float, float]]

    def median_ms(self, which: int) -> float:
        """Milliseconds of the first (0) or of the second (1)."""
        return 1000 * statistics.median(pair[which] for pair in self.seconds)

    def ratio(self) -> float:
        """How many times as long the second takes: the median over the pairs."""
        return statistics.median(second / first for first, second in self.seconds)


def time_pairs(first: Callable[[], object], second: Callable[[], object], num_pairs: int) -> Pairs:
    """Run both in turn, so that both see the same machine; which goes first alternates. Two pairs of warm-up are left
    out."""
    pairs = []
    for index in range(num_pairs + WARMUP_PAIRS):
        seconds = {}
        for work in (first, second) if index % 2 else (second, first):
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[work] = time.perf_counter() - start
        pairs.append((seconds[first], seconds[second]))
    return Pairs(pairs[WARMUP_PAIRS:])
