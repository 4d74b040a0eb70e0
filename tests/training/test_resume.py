"""A run that was killed or stopped goes on as if nothing had happened, on another engine or number of ranks too."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from megadit.training import checkpoint

FSDP_2 = ("engine.kind=fsdp", "engine.num_ranks=2")
ZERO3_2 = ("engine.kind=zero3", "engine.num_ranks=2")
ENDLESS = ("training.num_images=1600000", "checkpoints.every_images=1600000", "validation.every_images=1600000")
START_SECONDS = 100


@contextmanager
def started(recipe: Path, run: Path, *overrides: str) -> Iterator[psutil.Popen]:
    """`megadit train` as a user starts it; whatever is left of it at the end is killed."""
    command = [sys.executable, "-P", "-m", "megadit", "train", str(recipe), *overrides, "--run", str(run)]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: psutil.Popen) -> None:
    """SIGKILL to a process and its ranks."""
    family = [*process.children(recursive=True), process] if process.is_running() else []
    for member in family:
        member.kill()
    psutil.wait_procs(family)


def wait_for_steps(process: psutil.Popen, run: Path, num_steps: int) -> None:
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + START_SECONDS
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= num_steps):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "it does not start"
        time.sleep(0.002)


def assert_continues(run: Any, reference: Any) -> None:
    curve, expected = run.curve(), reference.curve()
    assert curve["step"] == expected["step"]  # each step once
    assert curve["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert curve["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert run.validation() == pytest.approx(reference.validation(), rel=1e-5)
    for kind in ("weight", "ema_0.9"):
        assert run.largest_difference(reference, kind) < 1e-4


def test_a_killed_run_continues_on_another_engine(
    train: Callable, tiny_recipe: Callable, tiny_yaml: Path, reference: Any, tmp_path: Path
) -> None:
    run, every = tmp_path / "run", "checkpoints.every_images=48"
    kill_step = random.Random(2).randrange(4, 14)
    with started(tiny_yaml, run, *FSDP_2, every) as process:
        wait_for_steps(process, run, kill_step)
        kill_all(process)
    interrupted = len((run / "metrics.jsonl").read_text().splitlines())
    assert kill_step <= interrupted < len(reference.curve()["step"])
    assert_continues(train(tiny_recipe(*ZERO3_2, every), run), reference)


@pytest.mark.parametrize(("first", "then"), [(ZERO3_2, ()), ((), FSDP_2)], ids=["zero3 to single", "single to fsdp"])
def test_a_run_continues_on_another_number_of_ranks(
    first: tuple[str, ...],
    then: tuple[str, ...],
    finished: Callable,
    train: Callable,
    tiny_recipe: Callable,
    reference: Any,
    tmp_path: Path,
) -> None:
    """The second half is done again: what a run killed just before its next checkpoint has to do."""
    run = tmp_path / "run"
    shutil.copytree(finished(*first).folder, run)
    for newer in sorted((run / "checkpoints").iterdir())[2:]:
        shutil.rmtree(newer)
    begun = train(tiny_recipe(*then), run)
    assert_continues(begun, reference)
    assert len(json.loads((run / "environment.json").read_text())) == 2


@pytest.mark.parametrize(
    ("overrides", "number", "to_one_rank"),
    [((), signal.SIGINT, False), (FSDP_2, signal.SIGTERM, True)],
    ids=["SIGINT", "SIGTERM to one rank of two"],
)
def test_a_stop_signal_leaves_a_checkpoint(
    overrides: tuple[str, ...], number: int, to_one_rank: bool, tiny_yaml: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with started(tiny_yaml, run, *overrides, *ENDLESS) as process:
        wait_for_steps(process, run, 3)
        (process.children()[-1] if to_one_rank else process).send_signal(number)
        output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 75, output
    assert "run it again to resume" in output
    (path,) = (run / "checkpoints").iterdir()
    header = checkpoint.read_header(path)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert header.images_seen == last["images"] == 16 * header.num_steps


def test_a_finished_run_is_left_as_it_is(
    train: Callable, tiny_recipe: Callable, reference: Any, tmp_path: Path
) -> None:
    shutil.copytree(reference.folder, tmp_path / "run")
    lines = (reference.folder / "metrics.jsonl").read_text()
    again = train(tiny_recipe(), tmp_path / "run")
    assert again.status == 0
    assert (again.folder / "metrics.jsonl").read_text() == lines
    assert [path.name for path in again.checkpoints()] == [path.name for path in reference.checkpoints()]
