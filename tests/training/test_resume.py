"""A run that was killed or stopped goes on as if nothing had happened, on another engine or number of ranks too."""

import json
import random
import re
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

from megadit.data.storage import open_store
from megadit.training import checkpoint, trainer

FSDP_2 = ("engine.kind=fsdp", "engine.num_ranks=2")
ZERO3_2 = ("engine.kind=zero3", "engine.num_ranks=2")
ENDLESS = ("training.num_images=1600000", "checkpoints.every_images=1600000", "validation.every_images=1600000")
TWO_STEPS = ("training.num_images=32", "validation=null", "checkpoints.every_images=32")
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
    train(tiny_recipe(*ZERO3_2, every), run).assert_continues_as(reference)


def test_a_run_killed_in_its_second_stage_continues_on_another_engine(
    train: Callable, staged: Callable, staged_yaml: Path, whole: Any, tmp_path: Path
) -> None:
    run, slowly = tmp_path / "run", "checkpoints.asynchronous=false"
    with started(staged_yaml, run, slowly) as process:
        wait_for_steps(process, run, 8 + 3 + 3)  # of the first stage, its validation, and of the second
        kill_all(process)
    (header, *_) = [checkpoint.read_header(path) for path in checkpoint.newest_first(run / "checkpoints")]
    assert 128 <= header.images_seen < 224
    train(staged(*FSDP_2), run).assert_continues_as(whole)


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
    begun.assert_continues_as(reference)
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


# What a run begins with


@pytest.mark.parametrize(
    ("source", "first_step", "way"),
    [("", 11, ()), ("checkpoints/images-0000000080", 6, FSDP_2)],
    ids=["a run", "a checkpoint, on two ranks"],
)
def test_a_run_begins_with_the_state_of_another(
    source: str,
    first_step: int,
    way: tuple[str, ...],
    train: Callable,
    tiny_recipe: Callable,
    reference: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = shutil.copytree(reference.folder, tmp_path / "other")
    for newer in sorted((other / "checkpoints").iterdir())[2:]:
        shutil.rmtree(newer)
    run = train(tiny_recipe(*way), tmp_path / "run", resume=str(other / source))
    curve, expected = run.curve(), reference.curve()
    assert curve["step"] == list(range(first_step, 21))
    assert curve["loss"] == pytest.approx(expected["loss"][first_step - 1 :], rel=1e-4)
    assert run.largest_difference(reference, "weight") < 1e-4
    caplog.set_level("INFO")
    again = train(tiny_recipe(), tmp_path / "run", resume=str(other / source))  # it has checkpoints of its own now
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / 'images-0000000320'}" in caplog.text
    assert again.curve() == curve


def test_a_run_begins_with_the_copies_of_another(tiny_recipe: Callable, s3_bucket: str, tmp_path: Path) -> None:
    url = f"{s3_bucket}/runs/a"
    assert trainer.train(tiny_recipe(*TWO_STEPS, f"checkpoints.copy_url={url}"), tmp_path / "a") == 0
    assert trainer.train(tiny_recipe(*TWO_STEPS), tmp_path / "b", resume=url) == 0
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == ""  # nothing was left to do
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()] == ["images-0000000032"]


def test_never_begins_only_where_there_is_nothing(tiny_recipe: Callable, tmp_path: Path) -> None:
    copies = f"file://{tmp_path}/copies"
    recipe = tiny_recipe(*TWO_STEPS, f"checkpoints.copy_url={copies}")
    assert trainer.train(recipe, tmp_path / "run", resume="never") == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(
        ValueError, match="run has checkpoints, the newest is images-0000000032: go on without --resume"
    ):
        trainer.train(recipe, tmp_path / "run", resume="never")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines
    with pytest.raises(ValueError, match=f"{copies} has copies of checkpoints: .* another checkpoints.copy_url"):
        trainer.train(recipe, tmp_path / "elsewhere", resume="never")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("{tmp}/nowhere", r"--resume .*/nowhere: there is no checkpoint; allowed: auto, never, the folder of a run or"),
        ("file://{tmp}/nowhere", "--resume file:.*/nowhere: there is no copy of a checkpoint; allowed: auto, never, "),
        ("nver", "--resume nver: there is no checkpoint; allowed: auto, never, "),
    ],
)
def test_a_state_that_is_not_there(resume: str, message: str, tiny_recipe: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_recipe(), tmp_path / "run", resume=resume.format(tmp=tmp_path))
    assert not (tmp_path / "run").exists()


def test_keys_that_matter_are_told_from_those_that_do_not(
    tiny_recipe: Callable, reference: Any, s3_bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    own = shutil.copytree(reference.folder, tmp_path / "own")
    open_store(s3_bucket).put("recipe.yaml", (own / "recipe.yaml").read_bytes())
    open_store(s3_bucket).put("images-0000000080/checkpoint.json", b"{}")
    other = tiny_recipe("seed=1", "optimizer.lr=2^-8", "checkpoints.keep=1", "engine.compile=true")
    message = (
        r" holds a run of another recipe; these keys make it another run: "
        r"optimizer\.lr: 0\.0078125 there, 0\.00390625 now \(add a stage that changes it\); "
        r"seed: 0 there, 1 now \(weights, order and noise are drawn from it\) "
        r"\(these are free and were changed, too: "
        r"checkpoints\.keep: 4 there, 1 now; engine\.compile: False there, True now\)"
    )
    for run, resume in [("own", "auto"), ("run", str(own)), ("run", s3_bucket)]:
        place = f"--resume {resume}" if run == "run" else str(own)
        with pytest.raises(ValueError, match=re.escape(place) + message):
            trainer.train(other, tmp_path / run, resume=resume)
    assert not (tmp_path / "run").exists()
    assert trainer.train(tiny_recipe("checkpoints.keep=1"), own) == 0
    assert "these keys are free and were changed: checkpoints.keep: 4 there, 1 now" in caplog.text


def test_a_checkpoint_of_another_model_or_damaged_is_named(
    tiny_recipe: Callable, reference: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = shutil.copytree(reference.checkpoints()[0], tmp_path / "alone")
    with pytest.raises(
        ValueError,
        match=r"alone is of another model: \d+ parameters differ: blocks\.0\S* \(\[256\] there, \[384\] here\)",
    ):
        trainer.train(tiny_recipe("model.width=96"), tmp_path / "wider", resume=str(alone))
    assert "no run is around this checkpoint, so its recipe is unknown" in caplog.text
    data = max(alone.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match=f"--resume {alone}: the checkpoint is damaged: {data.name} has changed"):
        trainer.train(tiny_recipe(), tmp_path / "run", resume=str(alone))
