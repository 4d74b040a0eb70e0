"""A run that is killed again and again, at any moment and on any engine, ends as if it had not been."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from megadit.training import checkpoint

EVERY = 3  # steps from one checkpoint to the next
NEWEST_TWO = ["images-0000000288", "images-0000000320"]
ENGINES = {
    "single": ("single", 1, 1),
    "fsdp": ("fsdp", 2, 1),
    "hsdp": ("fsdp", 4, 2),
    "zero1": ("zero1", 2, 1),
    "zero2": ("zero2", 2, 1),
    "zero3": ("zero3", 2, 1),
}
Leg = tuple[str, int, str, int]  # the engine, the victim, before its n-th "step" or "operation" on checkpoints
# Each engine once as the one that is left, and once as the one that goes on.
RING: list[Leg] = [
    ("single", 0, "step", 7),
    ("fsdp", 0, "operation", 14),
    ("hsdp", 3, "step", 4),
    ("zero1", 1, "operation", 3),
    ("zero2", 0, "step", 4),
    ("zero3", 1, "step", 5),
]


@pytest.fixture(scope="session")
def survive(
    run_ranks: Callable,
    tiny_recipe: Callable,
    train: Callable,
    reference: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[list[Leg], str], list[bool]]:
    """Train in legs that are killed and a last one that is not, and compare with the run that never was: which of the
    legs were killed before the run ended."""

    def recipe_on(engine: str) -> Any:
        kind, num_ranks, num_replicas = ENGINES[engine]
        changes = [f"engine.kind={kind}", f"engine.num_ranks={num_ranks}", f"engine.num_replicas={num_replicas}"]
        return tiny_recipe(*changes, f"checkpoints.every_images={16 * EVERY}", "checkpoints.keep=2")

    def survive(legs: list[Leg], last: str) -> list[bool]:
        run = tmp_path_factory.mktemp("killed") / "run"
        all_killed, saved = [], 0
        for engine, victim, kind, point in legs:
            death = {"victim": victim % ENGINES[engine][1], "kind": kind, "point": point}
            all_killed += run_ranks("killed_train.py", 1, recipe=recipe_on(engine), run=run, **death)
            newest = checkpoint.newest_valid(run / "checkpoints")
            before, saved = saved, checkpoint.read_header(newest).num_steps if newest else 0
            assert saved >= before
            # Lost are at most the interval that ran and the one of which the checkpoint was being written.
            assert num_logged(run) - saved <= 2 * EVERY
        train(recipe_on(last), run).assert_continues_as(reference)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == NEWEST_TWO
        return all_killed

    return survive


def num_logged(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b'"kind": "train"') if metrics.exists() else 0


def test_a_run_is_handed_on_from_engine_to_engine(survive: Callable) -> None:
    assert survive(RING, "single") == [True] * len(RING)


legs = st.lists(
    st.tuples(
        st.sampled_from(["single", "fsdp", "zero1", "zero2", "zero3"]),
        st.integers(0, 1),
        st.sampled_from(["step", "operation"]),
        st.integers(0, 60),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_may_be_killed_at_any_moment(survive: Callable) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(legs, st.sampled_from(sorted(ENGINES)))
    def check(killed: list[Leg], last: str) -> None:
        survive(killed, last)

    check()
