"""What is not finite is skipped on every rank alike, ranks that hang are named, ranks that disagree do not start."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megadit import engines
from megadit.data.loading.chunks import ChunkReader
from megadit.data.loading.loader import Loader
from megadit.data.loading.order import Order
from megadit.data.packing import encoding
from megadit.distributed import ALONE
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe, plan
from megadit.training import checkpoint, trainer

FSDP_2 = ("engine.kind=fsdp", "engine.num_ranks=2")
ZERO3_2 = ("engine.kind=zero3", "engine.num_ranks=2")
START_SECONDS = 100


def pack_broken(pack_animals: Callable, folder: Path, one_in: int) -> list[str]:
    """Pack with captions that turned into NaN, in a share of the samples; the overrides that train on them."""

    def encode(values: torch.Tensor, what: str) -> np.ndarray:
        broken = zlib.crc32(what.split("'")[1].encode()) % one_in == 0  # by the key
        return np.full(values.shape, np.nan, np.float16) if broken else values.numpy().astype(np.float16)

    with pytest.MonkeyPatch.context() as patch:  # packing refuses them, so they break in it
        patch.setattr(encoding, "to_float16", encode)
        pack_animals(str(folder))
    return [f"data.url=file://{folder}/train", f"data.validation_url=file://{folder}/validation"]


@pytest.fixture(scope="module")
def few_broken(pack_animals: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eleven steps, of which a few have a broken sample."""
    steps = ["training.num_images=176", "validation=null"]
    return [*pack_broken(pack_animals, tmp_path_factory.mktemp("few"), 53), *steps]


@pytest.fixture(scope="module")
def all_broken(pack_animals: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """With whole captions: a dropped one is not read."""
    settings = ["validation=null", "objective.condition_dropout=0"]
    return [*pack_broken(pack_animals, tmp_path_factory.mktemp("all"), 1), *settings]


def broken_steps(recipe: Recipe) -> list[int]:
    """The steps, from 1, with a caption that is not finite and not dropped."""
    batches = Loader(recipe.data, recipe.seed, recipe.training.batch_size, 0, 1).iterate(0)
    steps = []
    for step in range(1, recipe.num_steps + 1):
        batch = next(batches)
        read = batch.drop_uniform >= recipe.objective.condition_dropout
        if not bool(torch.isfinite(batch.pooled[read]).all()):
            steps.append(step)
    batches.close()
    return steps


# Skipped steps


@pytest.fixture(scope="module")
def skipping(train: Callable, tiny_recipe: Callable[..., Recipe], few_broken: list[str]) -> Any:
    return train(tiny_recipe(*few_broken))


def test_a_step_that_is_not_finite_is_skipped_and_told(
    skipping: Any, tiny_recipe: Callable[..., Recipe], few_broken: list[str]
) -> None:
    recipe = tiny_recipe(*few_broken)
    broken = broken_steps(recipe)
    assert broken == [3, 9, 10]
    assert skipping.status == 0
    told = skipping.lines("skipped")
    assert [line["step"] for line in told] == broken
    assert [line["skipped_steps"] for line in told] == list(range(1, len(broken) + 1))
    assert all(line["grad_norm"] in ("nan", "inf") for line in told)
    taken = skipping.curve()
    assert taken["step"] == [step for step in range(1, 12) if step not in broken]
    assert all(math.isfinite(value) for value in taken["loss"] + taken["grad_norm"])
    assert skipping.lines("train")[-1]["skipped_steps"] == len(broken)
    header = checkpoint.read_header(skipping.checkpoints()[-1])
    assert (header.images_seen, header.num_steps) == (176, 8)


@pytest.mark.parametrize("way", [FSDP_2, ZERO3_2], ids=["fsdp", "zero3"])
def test_steps_are_skipped_on_every_rank_alike(
    way: tuple[str, ...], skipping: Any, train: Callable, tiny_recipe: Callable[..., Recipe], few_broken: list[str]
) -> None:
    """The broken sample is on one rank only."""
    run = train(tiny_recipe(*few_broken, *way))
    assert [line["step"] for line in run.lines("skipped")] == [line["step"] for line in skipping.lines("skipped")]
    assert run.curve()["loss"] == pytest.approx(skipping.curve()["loss"], rel=1e-4)
    assert run.largest_difference(skipping) < 1e-4


def test_a_run_that_skipped_is_resumed(
    skipping: Any, train: Callable, tiny_recipe: Callable[..., Recipe], few_broken: list[str], tmp_path: Path
) -> None:
    """Adam's step count is that of the updates, not of the images."""
    run = shutil.copytree(skipping.folder, tmp_path / "run")
    kept, *newer = sorted((run / "checkpoints").iterdir())
    for path in newer:
        shutil.rmtree(path)
    header = checkpoint.read_header(kept)
    assert (header.images_seen, header.num_steps) == (80, 4)
    again = train(tiny_recipe(*few_broken), run)
    assert again.curve() == skipping.curve()  # the same engine: to the last bit
    assert again.largest_difference(skipping, "weight") == 0


@pytest.mark.parametrize("way", [(), FSDP_2], ids=["single", "fsdp"])
def test_a_run_that_skips_only_stops_and_says_why(
    way: tuple[str, ...], tiny_recipe: Callable[..., Recipe], all_broken: list[str], run_ranks: Callable, tmp_path: Path
) -> None:
    recipe = tiny_recipe(*all_broken, *way, "training.max_skipped_steps=2")
    run = tmp_path / "run"
    message = r"^step 1 \(16 images seen\): the gradient norm is (nan|inf): .*; 2 steps in a row were skipped, see "
    if way:
        with pytest.raises(ExceptionGroup) as caught:
            run_ranks("train.py", 2, recipe=recipe, run=run)
        assert caught.group_contains(ValueError, match=message)
        assert len(caught.value.exceptions) == 2
    else:
        with pytest.raises(ValueError, match=message):
            trainer.train(recipe, run)
    found = json.loads((run / "not-finite-1.json").read_text())
    assert found["weights_not_finite"] == []
    names = [spec.name for spec in build_table(recipe)]
    assert set(found["gradients_not_finite"]) <= set(names)
    assert "text_embed.weight" in found["gradients_not_finite"]
    manifest = ChunkReader(recipe.data.url).manifest
    order = Order(manifest.num_samples, recipe.seed, 4, recipe.data.chunk_samples, recipe.data.chunks_per_group)
    for step, told in enumerate(found["steps"]):
        assert told["step"] == step
        samples = [(sample["epoch"], sample["sample"]) for sample in told["samples"]]
        assert samples == [tuple(pair) for pair in order.step(step, 16).tolist()]
        assert {sample["loss"] for sample in told["samples"]} == {"nan"}


def test_weights_that_are_not_finite_stop_a_run_at_once(
    reference: Any, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """No later step can succeed, and a checkpoint of such weights would take the place of a good one."""
    recipe = tiny_recipe()
    engine = engines.build(recipe, ALONE)
    name = "blocks.1.image.qkv.weight"
    engine.shards[name].values[7] = torch.nan
    with pytest.raises(ValueError, match=r"^step 0 .* 1 weights are not finite, see .*/not-finite-0\.json$"):
        trainer.Trainer(
            recipe, plan(recipe)[0], tmp_path, engine, None, trainer.StopRequest(), trainer.end_process
        ).train()
    assert json.loads((tmp_path / "not-finite-0.json").read_text())["weights_not_finite"] == [name]
    assert not (tmp_path / "checkpoints").exists()


# Ranks


def test_ranks_that_disagree_do_not_start(
    run_ranks: Callable, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipes = [tiny_recipe(*FSDP_2), tiny_recipe(*FSDP_2, "optimizer.lr=2^-8", "data.num_workers=1")]
    with pytest.raises(ExceptionGroup) as caught:
        run_ranks("disagree.py", 2, recipes=recipes, run=tmp_path / "run")
    message = (
        r"rank 1 was started with another recipe than rank 0 \(data\.num_workers: 0 there, 1 now; "
        r"optimizer\.lr: 0\.0078125 there, 0\.00390625 now\)"
    )
    assert caught.group_contains(ValueError, match=message)
    assert len(caught.value.exceptions) == 2
    assert not (tmp_path / "run").exists()


def test_the_rank_that_hangs_is_named(run_ranks: Callable, tmp_path: Path) -> None:
    said = run_ranks("stall.py", 2, limit=2.0, folder=tmp_path)
    told = [text for text in said if text]
    assert told
    for text in told:
        assert text.startswith("rank 1 hangs in the data of step 3: nothing moved for 2 s (training.stall_seconds)")
    assert "stall.py" in (tmp_path / "stack-rank-1.txt").read_text()
    assert "barrier" in (tmp_path / "stack-rank-0.txt").read_text()


@pytest.mark.parametrize(
    ("hangs", "asynchronous"),
    [
        pytest.param(False, False, id="slow"),
        pytest.param(False, True, id="slow, asynchronous", marks=pytest.mark.slow),
        pytest.param(True, False, id="hangs", marks=pytest.mark.slow),
        pytest.param(True, True, id="hangs, asynchronous"),
    ],
)
def test_a_write_may_be_slow_but_must_not_hang(
    hangs: bool, asynchronous: bool, run_ranks: Callable, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """One of twice the limit, on one rank of two: both wait for it, in the save or at the end."""
    limit = 4.0
    recipe = tiny_recipe(*FSDP_2, f"checkpoints.asynchronous={asynchronous}")
    seconds = limit / 2 if hangs else 2 * limit
    said = run_ranks("slow_disk.py", 2, recipe=recipe, run=tmp_path, limit=limit, seconds=seconds, hangs=hangs)
    if not hangs:
        assert said == [None, None]
        return
    told = [text for text in said if text]
    assert told
    for text in told:
        assert text.startswith("rank 1 hangs in the checkpoint of step 1: nothing moved for 4 s"), text
    assert "slow_write" in (tmp_path / "stalls" / "stack-rank-1.txt").read_text()


@contextmanager
def started(recipe: Path, run: Path, *overrides: str) -> Iterator[psutil.Popen]:
    """`megadit train` as a user starts it, after its first steps; whatever is left of it at the end is killed."""
    command = [sys.executable, "-P", "-m", "megadit", "train", str(recipe), *overrides, "--run", str(run)]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.monotonic() + START_SECONDS
    try:
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "it does not start"
            time.sleep(0.01)
        yield process
    finally:
        family = [*process.children(recursive=True), process] if process.is_running() else []
        for member in family:
            member.kill()
        psutil.wait_procs(family)


ENDLESS = ("training.num_images=1600000", "checkpoints.every_images=1600000", "validation.every_images=1600000")


@pytest.mark.slow
def test_a_rank_that_is_frozen_ends_the_run(tiny_yaml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(tiny_yaml, run, *FSDP_2, *ENDLESS, "training.stall_seconds=4") as process:
        (frozen,) = [child for child in process.children() if child.environ().get("RANK") == "1"]
        frozen.suspend()
        output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 1, output
    (error,) = [line for line in output.splitlines() if line.startswith("megadit: error: ")]
    assert "rank 0: rank 1 gives no sign of life, last in the " in error
    assert " of step " in error
    assert not frozen.is_running()


@pytest.mark.slow
def test_slurms_warning_leaves_a_checkpoint(tiny_yaml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(tiny_yaml, run, *FSDP_2, *ENDLESS) as process:
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 75, output
    (path,) = (run / "checkpoints").iterdir()
    assert checkpoint.find_damage(path) is None
