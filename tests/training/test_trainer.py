"""What the trainer refuses, what it lets change, and the numbers it reports."""

import logging
import math
import os
import platform
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megadit import engines
from megadit.distributed import ALONE
from megadit.parametrization import base_shapes
from megadit.recipe import Recipe, RecipeError
from megadit.sampling.generate import sample
from megadit.training import checkpoint, run_folder, trainer
from megadit.training.ema import Averages
from megadit.training.signals import STOP_SIGNALS, stop_on_signal

SHORT = ("training.num_images=48", "checkpoints.every_images=48", "validation.every_images=48")


@pytest.fixture
def half(reference: Any, tmp_path: Path) -> Path:
    """A copy of the reference run as it was after 10 steps."""
    run = shutil.copytree(reference.folder, tmp_path / "run")
    for newer in sorted((run / "checkpoints").iterdir())[2:]:
        shutil.rmtree(newer)
    return run


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files but the lock, which says who had the run last."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != run_folder.LOCK]
    return {path: path.read_bytes() for path in files}


def test_an_error_of_one_rank_reaches_all(run_ranks: Callable) -> None:
    assert run_ranks("one_error.py", 2) == ["rank 1: no such file"] * 2


# Resuming


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=2^-8", r"optimizer\.lr: 0\.0078125 there, 0\.00390625 now"),
        ("training.batch_size=32", r"training\.batch_size: 16 there, 32 now"),
        ("training.ema_rates=[0.9,0.99]", r"training\.ema_rates: \[0\.9\] there, \[0\.9, 0\.99\] now"),
        ("data.chunk_samples=4", r"data\.chunk_samples: 8 there, 4 now"),
    ],
)
def test_a_run_is_not_continued_with_another_recipe(
    override: str, message: str, half: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    before = contents(half)
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_recipe(override), half)
    assert contents(half) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.input_size=32", "model.input_size is 32, the data has 16"),
        ("model.text_dim=8", "model.text_dim is 8, the data has 384"),
    ],
)
def test_data_that_the_model_does_not_take(
    override: str, message: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_recipe(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_data_of_another_kind(
    tiny_recipe: Callable[..., Recipe], pack_animals: Callable, tmp_path: Path
) -> None:
    pack_animals(str(tmp_path / "labelled"), label="subgroup")
    other = f"data.validation_url=file://{tmp_path}/labelled/validation"
    with pytest.raises(ValueError, match=r"the validation data at .*/validation has other classes than the data at"):
        trainer.train(tiny_recipe(other), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_has_no_effect_on_the_curve_may_change(
    half: Path, train: Callable, tiny_recipe: Callable[..., Recipe], reference: Any
) -> None:
    changes = ["engine.kind=fsdp", "data.num_workers=2", "training.micro_batch_size=8", "checkpoints.keep=1"]
    run = train(tiny_recipe(*changes), half)
    assert run.curve()["step"] == reference.curve()["step"]
    assert run.curve()["loss"] == pytest.approx(reference.curve()["loss"], rel=1e-4)
    assert [path.name for path in run.checkpoints()] == ["images-0000000320"]


def test_a_run_is_not_continued_on_other_data(
    half: Path, tiny_recipe: Callable[..., Recipe], pack_animals: Callable, tmp_path: Path
) -> None:
    pack_animals(str(tmp_path / "other"), seed=4)
    with pytest.raises(ValueError, match=r"was trained on other data: fingerprint \w{12} there, \w{12} now"):
        trainer.train(tiny_recipe(f"data.url=file://{tmp_path}/other/train"), half)


def test_a_line_of_metrics_cut_short_is_mended(
    half: Path, train: Callable, tiny_recipe: Callable[..., Recipe], reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = half / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:12]) + lines[12][:20])
    with caplog.at_level(logging.WARNING, logger="megadit"):
        run = train(tiny_recipe(), half)
    assert "cut short" in caplog.text
    assert run.curve() == reference.curve()  # the same engine: to the last bit


# Ranks


def test_a_number_of_ranks_that_does_not_divide_is_refused(
    run_ranks: Callable, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    message = r"3 ranks do not divide data\.num_streams 4; possible numbers of ranks: \[1, 2, 4\]"
    with pytest.raises(RecipeError, match=message):
        tiny_recipe("engine.kind=fsdp", "engine.num_ranks=3")
    with pytest.raises(ExceptionGroup) as caught:  # started by another launcher, which does not ask the recipe
        run_ranks("train.py", 3, recipe=tiny_recipe("engine.kind=fsdp"), run=tmp_path / "run")
    assert caught.group_contains(ValueError, match=message)
    assert len(caught.value.exceptions) == 3
    assert not (tmp_path / "run").exists()


def test_a_single_process_engine_on_two_ranks_is_refused(
    run_ranks: Callable, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        run_ranks("train.py", 2, recipe=tiny_recipe(), run=tmp_path / "run")
    assert caught.group_contains(ValueError, match="single runs on one rank, not 2; use another engine.kind")


def test_validation_does_not_depend_on_the_number_of_ranks(train: Callable, tiny_recipe: Callable[..., Recipe]) -> None:
    """With a batch size that leaves ranks unequal shares and a last batch to fill up."""
    odd = (*SHORT, "validation.batch_size=7")
    one = train(tiny_recipe(*SHORT)).lines("validation")
    two = train(tiny_recipe(*odd, "engine.kind=fsdp", "engine.num_ranks=2")).lines("validation")
    assert [line["weights"] for line in one] == [line["weights"] for line in two] == ["raw", "ema_0.9"]
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert second["loss_strata"] == pytest.approx(first["loss_strata"], rel=1e-5)
        assert second["constant_loss"] == pytest.approx(first["constant_loss"], rel=1e-9)


# Steps


@pytest.mark.parametrize("kind", ["single", "fsdp", "zero3"])
def test_a_gradient_that_is_not_finite_stops_the_run(
    kind: str, train: Callable, tiny_recipe: Callable[..., Recipe], run_ranks: Callable, tmp_path: Path
) -> None:
    """Weights that are not finite, written into a checkpoint, are what a run that diverged would go on with."""
    run = tmp_path / "run"
    recipe = tiny_recipe(*SHORT)
    train(recipe, run)
    (path,) = (run / "checkpoints").iterdir()
    engine = engines.build(recipe, ALONE)
    averages = Averages(engine.shards, recipe.training.ema_rates)
    checkpoint.load(path, engine, averages)
    next(iter(engine.shards.values())).values.fill_(torch.inf)
    shutil.rmtree(path)
    with checkpoint.Saver(run, recipe, engine, averages) as saver:
        saver.save(images_seen=32, num_steps=2)
    (good,) = path.parent.iterdir()
    again = tiny_recipe(*SHORT, f"engine.kind={kind}", f"engine.num_ranks={1 if kind == 'single' else 2}")
    message = (
        r"^step 2 \(32 images seen\): the gradient norm is (nan|inf): the learning rate is too high, or a sample is"
    )
    if kind == "single":
        with pytest.raises(ValueError, match=message):
            trainer.train(again, run)
    else:
        with pytest.raises(ExceptionGroup) as caught:
            run_ranks("train.py", 2, recipe=again, run=run)
        assert caught.group_contains(ValueError, match=message)
        assert len(caught.value.exceptions) == 2
    assert list(path.parent.iterdir()) == [good]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_follows_torchs_schedules(schedule: str, tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(f"optimizer.schedule={schedule}")
    warmup, steps = recipe.optimizer.warmup_steps, recipe.num_steps
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedules = torch.optim.lr_scheduler
    after = (
        schedules.CosineAnnealingLR(optimizer, steps - warmup)
        if schedule == "cosine"
        else schedules.ConstantLR(optimizer, factor=1.0)
    )
    first = schedules.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
    expected = []
    sequence = schedules.SequentialLR(optimizer, [first, after], [warmup])
    for _ in range(steps):
        expected.append(sequence.get_last_lr()[0])
        optimizer.step()
        sequence.step()
    factors = [recipe.optimizer.lr_factor(step, recipe.num_steps) for step in range(steps)]
    assert factors == pytest.approx(expected, abs=1e-9)


def test_the_last_step_of_cosine_is_not_wasted(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    factors = [recipe.optimizer.lr_factor(step, recipe.num_steps) for step in range(recipe.num_steps)]
    assert 0 < factors[-1] < factors[-2] < 1
    assert math.isclose(factors[recipe.optimizer.warmup_steps], 1.0)


def test_signal_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_on_signal() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop and stop.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_sampling_from_a_run(reference: Any, tmp_path: Path) -> None:
    grids = [tmp_path / name for name in ("ema.png", "raw.png", "again.png")]
    for grid, ema in zip(grids, (None, "weight", "ema_0.9"), strict=True):
        sample(reference.folder, ["red fox", "blue whale"], grid, ema=ema, num_steps=2)
    ema_grid, raw_grid, again = (grid.read_bytes() for grid in grids)
    assert ema_grid == again != raw_grid
    with pytest.raises(ValueError, match="holds no weights 'ema_0.5'"):
        sample(reference.folder, ["x"], tmp_path / "x.png", ema="ema_0.5")
    with pytest.raises(ValueError, match="give 'minilm' or a folder"):
        sample(reference.folder, ["x"], tmp_path / "x.png", encoder="absent")
    assert not (tmp_path / "x.png").exists()


def test_base_shapes_that_were_made_again_are_found(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """They are a file, so the recipe stays the same: with another base width the readout's multiplier is another."""
    shapes, run = tmp_path / "my.bsh", tmp_path / "run"
    muted = ("parametrization.base_width=null", f"parametrization.base_shapes={shapes}")
    base_shapes.make(tiny_recipe(), shapes)
    recipe = tiny_recipe(*SHORT, *muted)
    assert trainer.train(recipe, run) == 0
    base_shapes.make(tiny_recipe("parametrization.base_width=16"), shapes)
    message = r"another parameter table: patch_embed\.weight: width_mult 2\.0 there, 4\.0 now"
    with pytest.raises(ValueError, match=message):
        trainer.train(recipe, run)
    with pytest.raises(ValueError, match=message):
        sample(run, ["red heart"], tmp_path / "grid.png")


def test_a_run_that_is_being_trained_is_left_alone(
    tiny_recipe: Callable[..., Recipe], run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tiny_recipe(*SHORT)
    with run_folder.owned(tmp_path, ALONE):
        for _ in range(2):  # the one that is refused takes nothing from the one that has it
            with pytest.raises(ExceptionGroup) as raised:
                run_ranks("train.py", 1, recipe=recipe, run=tmp_path)
            said = str(raised.value.exceptions[0])
            assert f"{tmp_path} is being trained by process {os.getpid()} of {platform.node()} since 20" in said
        assert [path.name for path in tmp_path.iterdir()] == [run_folder.LOCK]
    assert run_ranks("train.py", 1, recipe=recipe, run=tmp_path) == [0]
