"""A family, an objective and an optimizer from a folder outside of the package do all that the shipped ones do."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from megadit.cli import app
from megadit.data.packing.pack import Packed
from megadit.planning import memory
from megadit.planning.flops import training_flops
from megadit.recipe import load

TOY = Path(__file__).parent / "toy"


@pytest.fixture(scope="module")
def labelled(pack_animals: Callable[..., Packed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    pack_animals(str(folder), label="subgroup", size=8)
    return folder


@pytest.fixture(scope="module")
def toy_yaml(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe of all three, and the folder of the modules that it imports where Python looks for them."""
    classes = json.loads((labelled / "train" / "manifest.json").read_text())["labels"]
    path = tmp_path_factory.mktemp("recipes") / "toy.yaml"
    path.write_text(f"""\
name: toy
imports: [toy_family, toy_objective, toy_optimizer]
model: {{preset: Toy-32, input_size: 8, in_channels: 3, num_kinds: {len(classes)}}}
parametrization: {{kind: mup, base_width: 32}}
objective: {{kind: toy_picture, condition_dropout: 0.25}}
data:
  {{url: "file://{labelled}/train", validation_url: "file://{labelled}/validation", num_streams: 4, chunk_samples: 4}}
optimizer: {{kind: toy_sign, lr: 2^-7, weight_decay: 0.01, decay_vectors: false}}
training: {{num_images: 192, batch_size: 16, ema_rates: [0.9], log_every_steps: 1}}
checkpoints: {{every_images: 96}}
validation: {{every_images: 96, num_timesteps: 2}}
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOY)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TOY), os.environ.get("PYTHONPATH")])))
        yield path


@pytest.fixture(scope="module")
def trained(toy_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "toy"
    succeed("train", toy_yaml, "--run", run)
    return run


def succeed(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result


def test_engines_give_one_curve_and_resume_each_other(toy_yaml: Path) -> None:
    """On a single process, FSDP2 and ZeRO-3 on two ranks: a run is killed on each and gone on with on each."""
    table = succeed("verify-trajectory", toy_yaml, "--only", "fsdp-2,zero3-2", "--steps", 12, "--resume").output
    assert "9 pairs, all within 0.0001" in table


def test_metrics_are_the_objectives(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 12
    assert all(line["loss"] == pytest.approx(line["picture"] + 0.5 * line["blur"], rel=1e-5) for line in steps)
    assert steps[-1]["picture"] < 0.7 * steps[0]["picture"]
    validation = [line for line in lines if line["kind"] == "validation"]
    assert {line["metric"] for line in validation} == {"picture"}


def test_table_and_start_up_block(toy_yaml: Path, trained: Path) -> None:
    shown = succeed("recipe", "show", toy_yaml, "model.width=64").output
    assert "small" in shown
    rows = {row["name"]: row for row in json.loads((trained / "parameters.json").read_text())}
    assert rows["blocks.0.mix.weight"]["weight_decay"] == 0.01
    assert rows["blocks.0.mix.bias"]["weight_decay"] == 0
    assert {"lr", "small"} <= rows["blocks.0.mix.bias"].keys()


def test_the_coordinate_check_passes(toy_yaml: Path, tmp_path: Path) -> None:
    succeed("coord-check", toy_yaml, "--widths", "32,64,128,256", "--seeds", 2, "--out", tmp_path)


def test_it_is_swept(toy_yaml: Path, tmp_path: Path) -> None:
    short = ["training.num_images=64", "validation=null"]
    space = ["--space", "model.width=32,64", "--space", "optimizer.lr=2^-8,2^-7,2^-6"]
    succeed("sweep", toy_yaml, *short, *space, "--study", tmp_path / "study", "--workers", 2)
    assert "picture" in succeed("transfer", tmp_path / "study").output


def test_memory_and_flops(toy_yaml: Path, tmp_path: Path) -> None:
    """As printed, and as counted by hand."""
    recipe, with_adam = load(toy_yaml), load(toy_yaml, ["optimizer={kind: adamw, lr: 2^-7}"])
    succeed("bench", "train", toy_yaml, "--micro-batch", 4, "--steps", 1, "--json", tmp_path / "train.json")
    (row,) = json.loads((tmp_path / "train.json").read_text())[0]["rows"]
    flops = 4 * training_flops(recipe.model, [0]) / (row["ms/step"] / 1000)
    assert row["TFLOP/s"] * 1e12 == pytest.approx(flops, rel=0.01)
    ours, adams = (
        {held.name: held.device_bytes for held in memory.predict(r, 2, 0).items} for r in (recipe, with_adam)
    )
    assert ours["optimizer state"] == ours["weights"] > 0
    assert adams["optimizer state"] == 2 * ours["weights"]


def test_it_samples_and_exports(trained: Path, tmp_path: Path) -> None:
    label = json.loads((trained / "data.json").read_text())["labels"][0]
    succeed("sample", trained, "--prompt", label, "--steps", 3, "--grid", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000
    succeed("checkpoint", "convert", trained, tmp_path / "toy.safetensors")
    assert load_file(tmp_path / "toy.safetensors").keys() >= {"blocks.1.mix.weight", "out.weight"}
    wanted = CliRunner().invoke(app, ["interop", "export-diffusers", str(trained), str(tmp_path / "out")])
    assert "diffusers has no class for the model family toy_mixer" in str(wanted.exception)


def test_without_its_modules_it_is_said_which(toy_yaml: Path, tmp_path: Path) -> None:
    path = tmp_path / "lost.yaml"
    path.write_text(toy_yaml.read_text().replace("toy_family", "toy_family_that_is_elsewhere"))
    with pytest.raises(ValueError, match="cannot import 'toy_family_that_is_elsewhere'.*on PYTHONPATH"):
        load(path)
