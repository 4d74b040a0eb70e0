"""Whether one recipe gives one curve on every engine and number of ranks, and from one to another: what
`megadit verify-trajectory` compares."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megadit.journal import read_file
from megadit.recipe import Recipe, average_names
from megadit.training import checkpoint

# Name -> engine.kind, ranks, replicas. All of them are compared with the single process.
WAYS: Mapping[str, tuple[str, int, int]] = {
    "fsdp-2": ("fsdp", 2, 1),
    "fsdp-4": ("fsdp", 4, 1),
    "hsdp-2x2": ("fsdp", 4, 2),
    **{f"zero{stage}-{ranks}": (f"zero{stage}", ranks, 1) for stage in (1, 2, 3) for ranks in (2, 4)},
}
SINGLE = ("single", 1, 1)
MIN_STEPS_TO_RESUME = 12  # two checkpoints, then at least one step that is none, then more that are done once


@dataclass(frozen=True)
class Difference:
    """Largest relative differences from the single process: of loss and gradient norm at a step, of weights or an
    average of them in norm at the end."""

    loss: float
    grad_norm: float
    weights: float

    @property
    def largest(self) -> float:
        """The largest of the three; NaN if one is."""
        values = (self.loss, self.grad_norm, self.weights)
        return math.nan if any(map(math.isnan, values)) else max(values)

    def within(self, tolerance: float) -> bool:
        """Whether none is above `tolerance`; NaN is."""
        return self.largest <= tolerance


def way_of(name: str) -> tuple[str, int, int]:
    """engine.kind, ranks and replicas of one of WAYS or of `single`."""
    return SINGLE if name == "single" else WAYS[name]


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


def resumable(recipe: Recipe, num_steps: int) -> list[str]:
    """What makes a run that `overrides_of` describes one that can be killed: a checkpoint after every few steps."""
    return [f"checkpoints.every_images={_interval(num_steps) * recipe.training.batch_size}"]


def kill_step(name: str, recipe: Recipe, num_steps: int) -> int:
    """After which step, counted from 1, the run on the engine `name` is killed: as good as any, but always the same.

    Not after one that has a checkpoint, so that steps are lost; and after two that have, as the first of them is
    written when the second is begun. Raises ValueError when `num_steps` are too few for that.
    """
    if num_steps < MIN_STEPS_TO_RESUME:
        raise ValueError(f"{num_steps} steps are too few to be killed and resumed: give at least {MIN_STEPS_TO_RESUME}")
    every = _interval(num_steps)
    steps = [step for step in range(2 * every + 1, num_steps - every) if step % every]
    return random.Random(f"{recipe.seed} {name}").choice(steps)


def num_logged_steps(run: Path) -> int:
    """How many steps a run that is going on has written down."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def resumes_after(run: Path) -> int:
    """The step of the newest whole checkpoint of a killed run."""
    path = checkpoint.newest_valid(run / "checkpoints")
    if path is None:
        raise ValueError(f"{run} was killed after two checkpoints were begun, and has none that is whole")
    return checkpoint.read_header(path).num_steps


def require_resumed(run: Path, killed: Path, step: int) -> None:
    """Raise ValueError unless the finished `run` began after `step` of `killed`, of which it is a continued copy.

    A run that begins anew gives the same curve. Its times are others.
    """
    lines = [(folder / "metrics.jsonl").read_text().splitlines()[:step] for folder in (run, killed)]
    if lines[0] != lines[1]:
        raise ValueError(f"{run} did not go on after step {step}: it has done earlier ones again")


def compare(run: Path, reference: Path, recipe: Recipe, after_step: int = 0) -> Difference:
    """Differences between two finished runs, of losses and gradient norms after a step. Raises ValueError where their
    steps are not the same."""
    ours, theirs = _steps(run), _steps(reference)
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        raise ValueError(f"{run} has {len(ours)} steps, {reference} has {len(theirs)}")
    loss, grad_norm = (
        max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours[after_step:], theirs[after_step:], strict=True))
        for key in ("loss", "grad_norm")
    )
    averages = average_names(recipe.training.ema_rates, recipe.training.ema_power_stds)
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


@dataclass(frozen=True)
class Killed:
    """A run that was killed, and what came of its copies on each engine that they were resumed on."""

    at_step: int
    from_step: int  # of the checkpoint that they go on from
    resumed: dict[str, Difference]


def resume_table(found: Mapping[str, Killed], tolerance: float, num_steps: int) -> str:
    """One line for each engine that a run was killed on, one column for each that it was resumed on."""
    pairs = {(row, column): value for row, killed in found.items() for column, value in killed.resumed.items()}
    wrong = {pair: value for pair, value in pairs.items() if not value.within(tolerance)}
    lines = [
        f"killed on one engine, resumed on another: largest relative difference from a single process that was not, "
        f"over {num_steps} steps",
        f"{'killed on':<10}{'after':>6}{'from':>6}  resumed on" + "".join(f"{name:>10}" for name in found),
    ]
    for row, killed in found.items():
        cells = (f"{value.largest:.1e}{' ' if value.within(tolerance) else '!'}" for value in killed.resumed.values())
        line = f"{row:<10}{killed.at_step:>6}{killed.from_step:>6}{'':>12}" + "".join(f"{cell:>10}" for cell in cells)
        lines.append(line.rstrip())
    for (row, column), value in wrong.items():
        lines.append(
            f"{row} to {column}: loss {value.loss:.1e}, grad norm {value.grad_norm:.1e}, weights {value.weights:.1e}"
        )
    worst = ", ".join(
        f"{key.replace('_', ' ')} {max(getattr(value, key) for value in pairs.values()):.1e}"
        for key in ("loss", "grad_norm", "weights")
    )
    verdict = f"{len(wrong)} NOT" if wrong else "all"
    return "\n".join([*lines, f"{len(pairs)} pairs, {verdict} within {tolerance:g}; largest: {worst}"])


def _interval(num_steps: int) -> int:
    """Steps from one checkpoint to the next."""
    return num_steps // 6


def _steps(run: Path) -> Sequence[Mapping[str, float]]:
    return [line for line in read_file(run / "metrics.jsonl") if line["kind"] == "train"]


def _in_norm(run: Path, reference: Path, kind: str) -> float:
    """Of one kind of weights in the last checkpoints: the norm of the difference over the norm, all tensors together.

    Not by tensor or element. The gradient of the bias of the keys, for one, is zero but for rounding, and Adam divides
    by the square root of a second moment that is next to nothing.
    """
    paths = [checkpoint.newest_valid(folder / "checkpoints") for folder in (run, reference)]
    ours, theirs = (checkpoint.read_tensors(path, kind) for path in paths if path is not None)
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return math.sqrt(difference / sum(float(values.double().square().sum()) for values in theirs.values()))
