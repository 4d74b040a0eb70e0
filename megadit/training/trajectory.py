"""Whether one recipe gives one curve on every engine and number of ranks: what `megadit verify-trajectory` compares."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megadit.recipe import Recipe
from megadit.training import checkpoint
from megadit.training.ema import average_name

# Name -> engine.kind, ranks, replicas. All of them are compared with the single process.
WAYS: Mapping[str, tuple[str, int, int]] = {
    "fsdp-2": ("fsdp", 2, 1),
    "fsdp-4": ("fsdp", 4, 1),
    "hsdp-2x2": ("fsdp", 4, 2),
    **{f"zero{stage}-{ranks}": (f"zero{stage}", ranks, 1) for stage in (1, 2, 3) for ranks in (2, 4)},
}
SINGLE = ("single", 1, 1)


@dataclass(frozen=True)
class Difference:
    """Largest relative differences from the single process: of loss and gradient norm at a step, of weights or an
    average of them in norm at the end."""

    loss: float
    grad_norm: float
    weights: float

    def within(self, tolerance: float) -> bool:
        """Whether none is above `tolerance`; NaN is."""
        return all(value <= tolerance for value in (self.loss, self.grad_norm, self.weights))


def parse_ways(names: str | None) -> list[str]:
    """`fsdp-2,zero3-4` as a list; all of them for None. Raises ValueError for a name that is none of WAYS."""
    chosen = names.split(",") if names else list(WAYS)
    for name in chosen:
        if name not in WAYS:
            raise ValueError(f"{name!r} is not one of {', '.join(WAYS)}")
    return chosen


def overrides_of(way: tuple[str, int, int], recipe: Recipe, num_steps: int) -> list[str]:
    """What makes `recipe` a run of `num_steps` logged steps on an engine, with one checkpoint at the end."""
    kind, num_ranks, num_replicas = way
    num_images = num_steps * recipe.training.batch_size
    return [
        f"engine.kind={kind}",
        f"engine.num_ranks={num_ranks}",
        f"engine.num_replicas={num_replicas}",
        "engine.cpu_offload=none",  # not every engine has these two
        "engine.compile=false",
        f"training.num_images={num_images}",
        "training.log_every_steps=1",
        f"checkpoints.every_images={num_images}",
        "checkpoints.copy_url=null",
        "validation=null",
    ]


def compare(run: Path, reference: Path, recipe: Recipe) -> Difference:
    """Differences between two finished runs. Raises ValueError where their steps are not the same."""
    ours, theirs = _steps(run), _steps(reference)
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        raise ValueError(f"{run} has {len(ours)} steps, {reference} has {len(theirs)}")
    loss, grad_norm = (
        max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs, strict=True))
        for key in ("loss", "grad_norm")
    )
    averages = [average_name(rate) for rate in recipe.training.ema_rates]
    return Difference(loss, grad_norm, max(_in_norm(run, reference, name) for name in (*averages, "weight")))


def table(found: Mapping[str, Difference], tolerance: float, num_steps: int) -> str:
    """One line for each engine."""
    lines = [
        f"largest relative difference from a single process over {num_steps} steps",
        f"{'engine':<10}{'ranks':>6}{'loss':>11}{'grad norm':>11}{'weights':>11}  within {tolerance:g}",
    ]
    for name, difference in found.items():
        verdict = "yes" if difference.within(tolerance) else "NO"
        values = f"{difference.loss:>11.1e}{difference.grad_norm:>11.1e}{difference.weights:>11.1e}"
        lines.append(f"{name.split('-')[0]:<10}{WAYS[name][1]:>6}{values}  {verdict}")
    return "\n".join(lines)


def _steps(run: Path) -> Sequence[Mapping[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def _in_norm(run: Path, reference: Path, kind: str) -> float:
    """Of one kind of weights in the last checkpoints: the norm of the difference over the norm, all tensors together.

    Not by tensor or element. The gradient of the bias of the keys, for one, is zero but for rounding, and Adam divides
    by the square root of a second moment that is next to nothing.
    """
    paths = [checkpoint.newest_valid(folder / "checkpoints") for folder in (run, reference)]
    ours, theirs = (checkpoint.read_tensors(path, kind) for path in paths if path is not None)
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return math.sqrt(difference / sum(float(values.double().square().sum()) for values in theirs.values()))
