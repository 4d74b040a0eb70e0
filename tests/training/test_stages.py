"""A run of several stages: each begins where the last ended, and a kill in the midst of one changes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megadit import engines
from megadit.data.loading.loader import Loader
from megadit.distributed import ALONE
from megadit.interop.commands import export_command
from megadit.randomness import seed_of_stage
from megadit.recipe import Recipe
from megadit.sampling.generate import load_model, sample
from megadit.training import checkpoint, run_folder, trainer
from megadit.training.checkpoint.export import average

FIRST = 128  # images of the first stage


def cut(run: Path, images_seen: int) -> None:
    """Remove the checkpoints after `images_seen`: a run that was killed before its next one."""
    for path in checkpoint.newest_first(run / "checkpoints"):
        if path.name > f"images-{images_seen:010d}":
            shutil.rmtree(path)


def test_stages_follow_each_other(whole: Any, staged: Callable[..., Recipe]) -> None:
    assert whole.status == 0
    lines = whole.lines("train")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["images"] for line in lines] == [*range(16, 129, 16), *range(136, 225, 8)]
    assert [line["stage"] for line in lines] == [0] * 8 + [1] * 12
    rates = [line["lr"] for line in lines]
    assert rates[8:] == [2**-9] + [2**-8] * 11  # warm-up and schedule begin anew
    assert [(line["stage"], line["images"]) for line in whole.lines("validation")] == [(0, 128)] * 3 + [(1, 224)] * 3
    headers = [checkpoint.read_header(path) for path in whole.checkpoints()]
    assert [(header.images_seen, header.stage) for header in headers] == [
        (48, 0),
        (96, 0),
        (128, 0),
        (144, 1),
        (192, 1),
        (224, 1),
    ]
    assert headers[-1].num_steps == 20
    assert run_folder.load_manifest(whole.folder, 0) != run_folder.load_manifest(whole.folder, 1)


def test_the_first_stage_is_the_run_that_has_no_other(
    whole: Any, staged: Callable[..., Recipe], train: Callable[..., Any]
) -> None:
    alone = train(staged("stages=[]"))
    assert alone.curve()["loss"] == whole.curve()["loss"][:8]


@pytest.mark.parametrize(
    ("way", "images_seen"),
    [
        ((), 128),
        pytest.param(("engine.kind=fsdp", "engine.num_ranks=2"), 96, marks=pytest.mark.slow),
        pytest.param(("engine.kind=zero3", "engine.num_ranks=2"), 144, marks=pytest.mark.slow),
        pytest.param(("engine.kind=zero1", "engine.num_ranks=2"), 112, marks=pytest.mark.slow),
    ],
    ids=["at the boundary, single", "first stage, fsdp", "second stage, zero3", "first stage, zero1"],
)
def test_a_run_killed_in_a_stage_goes_on_elsewhere(
    way: tuple[str, ...],
    images_seen: int,
    whole: Any,
    staged: Callable[..., Recipe],
    train: Callable[..., Any],
    tmp_path: Path,
) -> None:
    run = shutil.copytree(whole.folder, tmp_path / "run")
    cut(run, images_seen)
    train(staged(*way), run).assert_continues_as(whole)


def test_a_damaged_checkpoint_sends_a_run_back_a_stage(
    whole: Any, staged: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path
) -> None:
    run = shutil.copytree(whole.folder, tmp_path / "run")
    cut(run, 144)
    for path in checkpoint.newest_first(run / "checkpoints")[:2]:  # of the second stage, and the last of the first
        data = max(path.iterdir(), key=lambda path: path.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    train(staged(), run).assert_continues_as(whole)


def test_a_stage_starts_from_an_average(staged: Callable[..., Recipe], whole: Any, tmp_path: Path) -> None:
    run = shutil.copytree(whole.folder, tmp_path / "run")
    cut(run, FIRST)
    recipe = staged("stages.1.start_from=ema_0.9")
    stage = trainer.plan(recipe)[1]
    engine = engines.build(stage.recipe, ALONE)
    begun = trainer.Trainer(recipe, stage, run, engine, None, trainer.StopRequest(), trainer.end_process)
    path = checkpoint.newest_first(run / "checkpoints")[0]
    assert begun.begin(path) == FIRST
    average = checkpoint.read_tensors(path, "ema_0.9")
    assert not torch.equal(average["patch_embed.weight"], checkpoint.read_tensors(path, "weight")["patch_embed.weight"])
    for name, shard in engine.shards.items():
        assert torch.equal(shard.values.view(shard.shape), average[name])
        assert all(not slot.any() for slot in engine.optimizer_state()[name].values())
    assert begun.train() == 0
    last = checkpoint.newest_first(run / "checkpoints")[0]
    assert checkpoint.read_header(last).num_steps == 12  # the optimizer's own, which began anew
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    again = [line["loss"] for line in lines if line["kind"] == "train" and line["images"] > FIRST]
    assert again[0] != whole.curve()["loss"][8]


def test_starting_from_an_average_survives_a_kill(
    staged: Callable[..., Recipe], whole: Any, train: Callable[..., Any], tmp_path: Path
) -> None:
    runs = [shutil.copytree(whole.folder, tmp_path / name) for name in ("a", "b")]
    recipe = staged("stages.1.start_from=ema_0.9")
    for run in runs:
        cut(run, FIRST)
    once = train(recipe, runs[0])
    shutil.copytree(runs[0], runs[1], dirs_exist_ok=True)
    cut(runs[1], 192)
    assert train(recipe, runs[1]).curve() == once.curve()


def test_no_stage_repeats_the_draws_of_another(staged: Callable[..., Recipe]) -> None:
    recipe = staged()
    batches = [next(Loader(recipe.data, seed_of_stage(recipe.seed, stage), 16, 0, 1).iterate(0)) for stage in range(2)]
    assert batches[0].sample.tolist() != batches[1].sample.tolist()
    assert not set(batches[0].timestep_uniform.tolist()) & set(batches[1].timestep_uniform.tolist())


def test_a_checkpoint_is_sampled_at_the_resolution_of_its_stage(whole: Any, tmp_path: Path) -> None:
    assert load_model(whole.folder)[1].model.input_size == 24
    sample(whole.folder, ["red fox"], tmp_path / "large.png", num_steps=1)
    run = shutil.copytree(whole.folder, tmp_path / "run")
    cut(run, FIRST)
    assert load_model(run)[1].model.input_size == 16
    export_command(run, tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "transformer" / "config.json").read_text())
    assert config["sample_size"] == 16
    with pytest.raises(ValueError, match="are of stages with other settings of the model, such as the resolution"):
        average(whole.folder, tmp_path / "mean.safetensors", None, "fp32", [])


# What may change


def test_a_stage_may_be_added_to_a_run_that_is_over(
    staged: Callable[..., Recipe], whole: Any, train: Callable[..., Any]
) -> None:
    run = train(staged("stages=[]"))
    assert train(staged(), run.folder).curve()["loss"] == whole.curve()["loss"]


def test_a_stage_has_the_encoding_of_the_first(
    staged: Callable[..., Recipe], whole: Any, pack_animals: Callable, tmp_path: Path
) -> None:
    """Also one that is added when the first is over."""
    pack_animals(str(tmp_path / "labelled"), label="subgroup", size=24)
    urls = f"stages.1.data={{url: {tmp_path}/labelled/train, validation_url: {tmp_path}/labelled/validation}}"
    run = shutil.copytree(whole.folder, tmp_path / "run")
    cut(run, FIRST)
    for folder in (tmp_path / "new", run):
        with pytest.raises(ValueError, match=r"labelled/train has other classes than the data at .*/train"):
            trainer.train(staged(urls), folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.1.optimizer.lr=2^-9",
            r"stages\.1\.optimizer\.lr: 0\.00390625 there, 0\.001953125 now \(add a stage th",
        ),
        ("stages.1.start_from=weights", r"stages\.1\.start_from: None there, 'weights' now: the stage has begun"),
        ("stages.0.training={num_images: 256}", r"training\.num_images: 128 there, 256 now \(the stage is over\)"),
        (
            "stages.1.training.num_images=64",
            r"stages\.1\.training\.num_images: 96 there, 64 now \(224 images have been",
        ),
        ("stages=[]", r"stage high \(2 of 2\) has begun, and this recipe does not have it"),
    ],
)
def test_what_a_stage_that_has_begun_may_not_change(
    override: str, message: str, staged: Callable[..., Recipe], whole: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer.train(staged(override), whole.folder)


def test_a_constant_schedule_goes_on_for_longer(
    tiny_recipe: Callable[..., Recipe], train: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    constant = ("optimizer.schedule=constant", "validation=null", "checkpoints.every_images=48")
    long = train(tiny_recipe(*constant, "training.num_images=96"))
    run = train(tiny_recipe(*constant, "training.num_images=48"))
    with caplog.at_level("INFO", logger="megadit"):
        longer = train(tiny_recipe(*constant, "training.num_images=96", "objective.num_loss_bins=2"), run.folder)
    assert longer.curve() == long.curve()
    assert "these keys are free and were changed: objective.num_loss_bins: 4 there, 2 now" in caplog.text
    with pytest.raises(ValueError, match=r"num_images: 96 there, 48 now \(96 images have been seen\)"):
        trainer.train(tiny_recipe(*constant, "training.num_images=48"), run.folder)


def test_a_cosine_schedule_does_not(tiny_recipe: Callable[..., Recipe], reference: Any) -> None:
    message = (
        r"num_images: 320 there, 640 now \(with optimizer\.schedule cosine the steps so far depend on it; add a st"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_recipe("training.num_images=640"), reference.folder)


def test_averages_count_the_steps_of_all_stages(staged: Callable[..., Recipe], train: Callable[..., Any]) -> None:
    """A power function of exponent 0 weighs all steps alike: the average is the mean of the weights after each."""
    every = ("checkpoints={every_images: 8, keep: 9}", "training.num_images=32", "stages.1.training.num_images=24")
    run = train(staged(*every, f"training.ema_power_stds=[{12**-0.5}]", "validation=null"))
    after_steps = [checkpoint.read_tensors(path, "weight") for path in run.checkpoints()]
    assert len(after_steps) == 5
    for name, mean in checkpoint.read_tensors(run.checkpoints()[-1], f"ema_std{12**-0.5}").items():
        assert torch.allclose(mean, torch.stack([weights[name] for weights in after_steps]).mean(0), atol=1e-7)
