"""`megadit verify-trajectory`: short runs of one recipe on every engine, one after the other, and their comparison."""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megadit.exit_codes import DONE, FAILED
from megadit.launcher.forked import ForkedRanks
from megadit.recipe import load, one_stage

POLL_SECONDS = 0.002  # less than a step takes
logger = logging.getLogger(__name__)


def verify_trajectory(
    source: str, overrides: Sequence[str], num_steps: int, names: str | None, tolerance: float
) -> tuple[int, str]:
    """Run `source` with `overrides` for `num_steps` on a single process and on the engines `names`: exit code, table.

    The exit code is 0 where every difference is within `tolerance`, else 1. Raises ValueError for an unknown engine,
    for a recipe that cannot be shared by its ranks, and where a run fails.
    """
    from megadit.launcher import comparing_runs

    ways = comparing_runs.parse_ways(names)
    runs = _ShortRuns(source, overrides, num_steps, ["single", *ways])
    with tempfile.TemporaryDirectory(prefix="megadit-trajectory-") as folder:
        for name in ("single", *ways):
            logger.info("verify-trajectory: %s", name)
            runs.finish(name, Path(folder) / name)
        reference = Path(folder) / "single"
        found = {name: comparing_runs.compare(Path(folder) / name, reference, runs.recipe) for name in ways}
    passed = all(difference.within(tolerance) for difference in found.values())
    return DONE if passed else FAILED, comparing_runs.table(found, tolerance, num_steps)


def verify_resume(
    source: str, overrides: Sequence[str], num_steps: int, names: str | None, tolerance: float
) -> tuple[int, str]:
    """Kill a run on the single process and on each of the engines `names`, and resume it on each: exit code, table.

    A run is killed by SIGKILL to all ranks between two checkpoints, once for each engine; copies of it go on. Exit code
    and errors as of `verify_trajectory`, and ValueError for fewer steps than can be killed and resumed.
    """
    from megadit.launcher import comparing_runs

    ways = ["single", *comparing_runs.parse_ways(names)]
    runs = _ShortRuns(source, overrides, num_steps, ways)
    recipe, found = runs.recipe, {}
    kill_steps = {name: comparing_runs.kill_step(name, recipe, num_steps) for name in ways}
    resumable = comparing_runs.resumable(recipe, num_steps)
    with tempfile.TemporaryDirectory(prefix="megadit-trajectory-") as folder:
        reference = Path(folder) / "reference"
        runs.finish("single", reference)
        for first in ways:
            killed = Path(folder) / first
            at_step = _kill(runs, first, killed, kill_steps[first], resumable)
            from_step = comparing_runs.resumes_after(killed)
            found[first] = comparing_runs.Killed(at_step, from_step, {})
            for then in ways:
                logger.info("verify-trajectory: killed on %s after step %d, resumed on %s", first, at_step, then)
                with _copy(killed, then) as run:
                    runs.finish(then, run, *resumable)
                    comparing_runs.require_resumed(run, killed, from_step)
                    found[first].resumed[then] = comparing_runs.compare(run, reference, recipe, from_step)
    passed = all(difference.within(tolerance) for killed in found.values() for difference in killed.resumed.values())
    return DONE if passed else FAILED, comparing_runs.resume_table(found, tolerance, num_steps)


class _ShortRuns:
    """Runs of one recipe for a few steps, on any of the engines `names`."""

    def __init__(self, source: str, overrides: Sequence[str], num_steps: int, names: Sequence[str]) -> None:
        from megadit.launcher import comparing_runs

        self.recipe = one_stage(load(source, overrides), "megadit verify-trajectory")
        self._source = source
        self._num_ranks = {name: comparing_runs.way_of(name)[1] for name in names}
        self._overrides = {
            name: [*overrides, *comparing_runs.overrides_of(comparing_runs.way_of(name), self.recipe, num_steps)]
            for name in names
        }
        for changes in self._overrides.values():
            load(source, changes)  # what is wrong with one is said before any has run

    def start(self, name: str, run: Path, *more: str) -> ForkedRanks:
        """Begin or continue a run on an engine, with more overrides."""
        return ForkedRanks(self._num_ranks[name], self._source, [*self._overrides[name], *more], run)

    def finish(self, name: str, run: Path, *more: str) -> None:
        """The same, to its end. Raises ValueError when it fails."""
        with self.start(name, run, *more) as ranks:
            try:
                ranks.finish()
            except ValueError as error:
                raise ValueError(f"the run on {name} failed: {error}") from None


def _kill(runs: _ShortRuns, name: str, run: Path, step: int, overrides: Sequence[str]) -> int:
    """Begin a run and kill it after `step`. Returns the last step that it has logged."""
    from megadit.launcher import comparing_runs

    with runs.start(name, run, *overrides) as ranks:
        while comparing_runs.num_logged_steps(run) < step:
            if ranks.has_ended():
                ranks.finish()
                raise ValueError(f"the run on {name} ended before it could be killed after step {step}")
            time.sleep(POLL_SECONDS)
        ranks.kill()
    return comparing_runs.num_logged_steps(run)


@contextmanager
def _copy(killed: Path, name: str) -> Iterator[Path]:
    """A copy of a killed run, for as long as the context lasts."""
    run = killed.with_name(f"{killed.name}-to-{name}")
    shutil.copytree(killed, run)
    try:
        yield run
    finally:
        shutil.rmtree(run)
