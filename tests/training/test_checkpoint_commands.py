"""`megadit checkpoint`: what a user sees of checkpoints, and the files made of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from megadit.cli import app
from megadit.recipe import Recipe
from megadit.sampling.generate import load_model
from megadit.training import checkpoint, trainer

NAMES = [f"images-{images:010d}" for images in (16, 32, 48)]


@pytest.fixture(scope="module")
def trained(tiny_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps and three checkpoints."""
    run = tmp_path_factory.mktemp("run")
    trainer.train(tiny_recipe("training.num_images=48", "checkpoints.every_images=16", "validation=null"), run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def cut_short(run: Path, number: int) -> None:
    file = run / "checkpoints" / NAMES[number] / "rank-0.bin"
    file.write_bytes(file.read_bytes()[:-1])


def flip(run: Path, number: int) -> None:
    file = run / "checkpoints" / NAMES[number] / "rank-0.bin"
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)


def test_ls(run: Path) -> None:
    cut_short(run, 1)
    (run / "checkpoints" / NAMES[2] / "checkpoint.json").write_text("{}")
    first, second, third = call("ls", run).splitlines()[1:]
    header = checkpoint.read_header(run / "checkpoints" / NAMES[0])
    assert first.split()[:5] == [NAMES[0], "16", "0", "1", f"{header.num_bytes / 1e9:.3f}"]
    assert first.endswith("weight ema_0.9, all files there")
    assert "damaged: rank-0.bin has" in second
    assert third.split()[:2] == [NAMES[2], "48"]
    assert "damaged: checkpoint.json cannot be read" in third


def test_verify(run: Path) -> None:
    assert call("verify", run) == "".join(f"{name}: whole\n" for name in NAMES)
    flip(run, 1)
    assert f"{NAMES[1]}: damaged: rank-0.bin has changed" in call("verify", run, code=1)
    assert call("verify", run, "--images", 16) == f"{NAMES[0]}: whole\n"


@pytest.mark.parametrize("weights", ["weight", "ema_0.9"])
def test_convert_gives_what_the_model_is_loaded_with(weights: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "model.safetensors"
    assert f"{weights} of {NAMES[2]} in fp32" in call("convert", trained, out, "--weights", weights)
    model, _ = load_model(trained, weights)
    found, expected = load_file(out), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    call("convert", trained, out, "--weights", weights, "--dtype", "bf16")
    halves = load_file(out)
    assert all(torch.equal(halves[name], expected[name].bfloat16()) for name in expected)


def test_convert_of_an_older_checkpoint(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    call("convert", trained, out, "--images", 16)
    found = load_file(out)
    older = checkpoint.read_tensors(trained / "checkpoints" / NAMES[0], "ema_0.9")
    assert all(torch.equal(found[name], values) for name, values in older.items())


def test_average_is_the_mean_as_torch_takes_it(trained: Path, tmp_path: Path) -> None:
    """torch's AveragedModel, updated with the model of each checkpoint."""
    out = tmp_path / "mean.safetensors"
    call("average", trained, out, "--weights", "weight")
    model, _ = load_model(trained)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for name in NAMES:
        model.load_state_dict(checkpoint.read_tensors(trained / "checkpoints" / name, "weight"), strict=False)
        averaged.update_parameters(model)
    found = load_file(out)
    for name, expected in averaged.module.named_parameters():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)
    call("average", trained, out, "--weights", "weight", "--images", 16, "--images", 48)
    first, last = (checkpoint.read_tensors(trained / "checkpoints" / NAMES[n], "weight") for n in (0, 2))
    found = load_file(out)
    for name in first:
        torch.testing.assert_close(found[name], (first[name] + last[name]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "--images", 17], r"no checkpoint of 17 images seen; there are: \[16, 32, 48\]"),
        (["convert", "--images", 32], r"images-0000000032 is damaged: rank-0.bin has changed"),
        (["convert", "--weights", "ema_0.5"], r"no weights 'ema_0\.5'; there are: weight, ema_0\.9"),
        (["average"], r"images-0000000032 is damaged"),
        (["average", "--images", 16], r"at least two checkpoints; given: images-0000000016"),
    ],
)
def test_what_cannot_be_made_is_said(arguments: list[object], message: str, run: Path, tmp_path: Path) -> None:
    flip(run, 1)
    command, *options = map(str, arguments)
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(
            app, ["checkpoint", command, str(run), str(out), *options], catch_exceptions=False, standalone_mode=False
        )
    assert not out.exists()
