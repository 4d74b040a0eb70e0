"""Generation: the same files on any number of ranks and after any kill, and one clear message for what cannot be."""

import hashlib
import json
import random
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.data.loading.chunks import ChunkReader
from megadit.distributed import ALONE
from megadit.eval import units
from megadit.eval.other_layouts import export_data, export_geneval
from megadit.eval.picture_sets import Folder
from megadit.eval.task_images import Options, generate, to_png
from megadit.eval.tasks.benchmarks import TaskOptions, load_task
from megadit.eval.tasks.task import Task
from megadit.exit_codes import DONE
from megadit.training.trainer import train

worker = runpy.run_path(str(Path(__file__).parents[1] / "workers" / "eval_generate.py"))
CPU = torch.device("cpu")
CLASSES = ("animal-bird", "animal-bug", "2", "3", "4", "7")
BATCH_SIZE = 4
FAST = Options(num_steps=2, batch_size=BATCH_SIZE, guidance_scale=2.0)


@pytest.fixture(scope="module")
def labelled(pack_animals: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    pack_animals(str(folder), label="subgroup")
    return folder / "train"


@pytest.fixture(scope="module")
def runs(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each objective with two checkpoints."""
    made = {}
    for objective in ("ddpm", "flow"):
        made[objective] = tmp_path_factory.mktemp("runs") / objective
        assert train(worker["class_recipe"](labelled, objective), made[objective]) == DONE
    return made


@pytest.fixture
def task(tmp_path: Path) -> Task:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(CLASSES) + "\n")
    return load_task("prompts", TaskOptions(path, images_per_prompt=3))


def digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file under images/."""
    files = sorted(path for path in (folder / "images").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines_of(folder: Path) -> list[tuple[int, int]]:
    lines = [line for path in (folder / "units").iterdir() for line in path.read_text().splitlines()]
    return [(unit["prompt"], unit["image"]) for unit in map(json.loads, lines)]


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_a_folder_has_every_image_and_says_how_it_was_made(
    objective: str, runs: dict[str, Path], task: Task, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert generate(task, runs[objective], out, FAST, ALONE) == 18
    found = units.complete(out)
    assert [(unit.prompt, unit.image) for unit in found] == [(p, i) for p in range(6) for i in range(3)]
    assert found[4].path == out / "images" / "000000" / "000001-01.png"
    with Image.open(found[4].path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (16, 16))
    assert hashlib.sha256(found[4].path.read_bytes()).hexdigest() == found[4].sha256
    assert len({unit.sha256 for unit in found}) == 18
    manifest = units.read_manifest(out)
    assert manifest["task"] == {"id": "prompts", "version": 1}
    assert manifest["checkpoint"]["images_seen"] == 64
    assert manifest["weights"] == "ema_0.5"
    assert manifest["sampler"]["name"] == {"ddpm": "ddpm", "flow": "euler"}[objective]
    assert manifest["sampler"]["num_steps"] == 2 and manifest["guidance_scale"] == 2.0
    assert manifest["prompts_sha256"] == hashlib.sha256((tmp_path / "classes.txt").read_bytes()).hexdigest()
    assert [line["prompt"] for line in units.read_prompts(out)] == list(CLASSES)
    before = digests_of(out)
    assert generate(task, runs[objective], out, FAST, ALONE) == 0  # nothing is done twice
    assert digests_of(out) == before


def test_weights_in_bf16_make_nearly_the_same_images(runs: dict[str, Path], task: Task, tmp_path: Path) -> None:
    """What the sampler keeps is fp32 in both, so they part by the rounding of a prediction only."""
    pictures = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        generate(task, runs["flow"], out, replace(FAST, num_steps=4, precision=precision), ALONE)
        assert units.read_manifest(out)["dtype"] == precision
        pictures[precision] = np.stack([np.asarray(Image.open(unit.path)) for unit in units.complete(out)]).astype(int)
    difference = np.abs(pictures["fp32"] - pictures["bf16"])
    assert 0 < difference.mean() < 1 and difference.max() <= 8
    with pytest.raises(ValueError, match="dtype: 'fp32' there, 'bf16' now"):
        generate(task, runs["flow"], tmp_path / "fp32", replace(FAST, num_steps=4, precision="bf16"), ALONE)


def test_guided_channels_are_part_of_the_job(runs: dict[str, Path], task: Task, tmp_path: Path) -> None:
    """Of one step of Euler: an unguided channel is that of scale 1, a guided one that of the scale."""
    one_step, pictures = replace(FAST, num_steps=1), {}
    for name, options in {
        "all": one_step,
        "none": replace(one_step, guidance_scale=1),
        "first": replace(one_step, guidance_channels=1),
    }.items():
        generate(task, runs["flow"], tmp_path / name, options, ALONE)
        pictures[name] = np.stack([np.asarray(Image.open(unit.path)) for unit in units.complete(tmp_path / name)])
    assert [units.read_manifest(tmp_path / name)["guidance_channels"] for name in ("all", "first")] == [3, 1]
    assert not np.array_equal(pictures["all"][..., 1:], pictures["none"][..., 1:])
    assert np.array_equal(pictures["first"][..., 0], pictures["all"][..., 0])
    assert np.abs(pictures["first"][..., 1:].astype(int) - pictures["none"][..., 1:]).max() <= 1  # another batch size


def test_an_image_that_was_lost_comes_back_as_it_was(runs: dict[str, Path], task: Task, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(task, runs["ddpm"], out, FAST, ALONE)
    before = digests_of(out)
    units.image_path(out, 2, 1).unlink()
    with pytest.raises(ValueError, match=r"out is incomplete: 17 of 18 images .* missing is 000002-01.png"):
        units.complete(out)
    assert generate(task, runs["ddpm"], out, FAST, ALONE) == 1
    assert digests_of(out) == before


def test_noise_depends_on_task_prompt_and_image_alone(runs: dict[str, Path], task: Task, tmp_path: Path) -> None:
    """Other prompts before or after, other numbers of images: the pictures of the rest stay (up to other batches)."""
    fewer = Task(task.id, 1, task.records[:2], 2, "another list")
    generate(task, runs["flow"], tmp_path / "all", FAST, ALONE)
    generate(fewer, runs["flow"], tmp_path / "fewer", FAST, ALONE)
    for prompt in range(2):
        for image in range(2):
            pair = [
                np.asarray(Image.open(units.image_path(tmp_path / name, prompt, image))).astype(int)
                for name in ("all", "fewer")
            ]
            assert np.abs(pair[0] - pair[1]).max() <= 1
    other = Task("another", 1, task.records[:2], 2, "another list")
    generate(other, runs["flow"], tmp_path / "other", FAST, ALONE)
    assert not {*digests_of(tmp_path / "other").values()} & {*digests_of(tmp_path / "fewer").values()}


@pytest.mark.parametrize(
    ("objective", "precision"),
    [("ddpm", "fp32"), ("ddpm", "bf16"), pytest.param("flow", "fp32", marks=pytest.mark.slow)],
)
def test_killed_anywhere_and_gone_on_with_other_ranks(
    objective: str, precision: str, run_ranks: Callable, runs: dict[str, Path], task: Task, tmp_path: Path
) -> None:
    """Killed before syncs and renames of images, lists and the manifest, on one to three ranks: the same files."""
    options = {"num_steps": 2, "batch_size": BATCH_SIZE, "precision": precision}
    arguments = {"run": runs[objective], "prompts": tmp_path / "classes.txt", "images_per_prompt": 10}
    arguments["options"] = options
    (whole,) = run_ranks("eval_generate.py", 1, out=tmp_path / "whole", attempts=[(1, None, 0)], **arguments)
    assert whole == [True]
    roll = random.Random(objective).randrange
    # Prompts and manifest are four operations of rank 0; a batch is two for each image, and one for its lines.
    in_a_batch = 2 * BATCH_SIZE + 1
    attempts = [(1, 0, roll(4)), (2, 1, roll(in_a_batch)), (3, 2, roll(in_a_batch)), (1, 0, roll(in_a_batch))]
    (ended,) = run_ranks("eval_generate.py", 1, out=tmp_path / "out", attempts=[*attempts, (3, None, 0)], **arguments)
    assert ended == [False] * 4 + [True], attempts
    assert digests_of(tmp_path / "out") == digests_of(tmp_path / "whole")  # and nothing that is half written
    assert sorted(lines_of(tmp_path / "out")) == [(p, i) for p in range(6) for i in range(10)]  # each once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(ema="ema_0.9"), r"no weights 'ema_0.9'; --ema can be one of: weight, ema_0.5"),
        (Options(sampler="euler"), r"sampler euler is not for objective.kind ddpm, which has ddpm, dpm\+\+"),
        (Options(sampler="plms"), r"no sampler 'plms'"),
        (Options(shift=3.0), "--shift is for samplers of flow"),
        (Options(num_steps=1), r"num_steps 1 must be in \[2, 1000\]"),
        (Options(guidance_channels=4), "--guidance-channels 4: the model has 3 channels"),
    ],
)
def test_options_that_do_not_fit(
    options: Options, message: str, runs: dict[str, Path], task: Task, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(task, runs["ddpm"], tmp_path / "out", options, ALONE)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_job(runs: dict[str, Path], task: Task, tmp_path: Path) -> None:
    out, older = tmp_path / "out", runs["ddpm"] / "checkpoints" / "images-0000000032"
    generate(task, older, out, FAST, ALONE)
    with pytest.raises(ValueError, match=r"out holds images of another job \(checkpoint: .*32.* there, .*64.* now\)"):
        generate(task, runs["ddpm"], out, FAST, ALONE)
    with pytest.raises(ValueError, match="guidance_scale: 2.0 there, 4.0 now"):
        generate(task, older, out, Options(num_steps=2, batch_size=4), ALONE)
    other = Task("other", 1, task.records, 3, "another list")
    with pytest.raises(ValueError, match="prompts_sha256: .* there, 'another list' now; task: .*'prompts'"):
        generate(other, older, out, FAST, ALONE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="mine has files but no manifest.json"):
        generate(task, older, tmp_path / "mine", FAST, ALONE)


def test_sources_that_have_no_model(runs: dict[str, Path], task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent is not a run folder"):
        generate(task, tmp_path / "absent", tmp_path / "out", FAST, ALONE)
    copy = tmp_path / "copy"
    shutil.copytree(runs["ddpm"], copy)
    broken = copy / "checkpoints" / "images-0000000064"
    (file,) = broken.glob("rank-*")
    content = bytearray(file.read_bytes())
    content[100] ^= 1  # of the raw weights
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"images-0000000064 is damaged: .* has changed"):
        generate(task, broken, tmp_path / "out", replace(FAST, ema="weight"), ALONE)
    file.unlink()
    with pytest.raises(ValueError, match=r"images-0000000064 is damaged: .* is missing"):
        generate(task, broken, tmp_path / "out", replace(FAST, ema="weight"), ALONE)


def test_classes_that_the_model_does_not_have(runs: dict[str, Path], task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task imagenet50k has 1000 classes, the model 8"):
        generate(load_task("imagenet50k", TaskOptions()), runs["ddpm"], tmp_path / "out", FAST, ALONE)
    unknown = Task("prompts", 1, [*task.records, {"prompt": "animal-brd"}], 1, "a list")
    with pytest.raises(ValueError, match="no class 'animal-brd': did you mean 'animal-bird'"):
        generate(unknown, runs["ddpm"], tmp_path / "unknown", FAST, ALONE)


def test_labels_are_classes_and_metadata_are_not(runs: dict[str, Path], task: Task, tmp_path: Path) -> None:
    by_name = Task("prompts", 1, [{"prompt": "4", "label": "of the user"}, {"prompt": "7"}], 2, "a list")
    labels = [{"prompt": "", "label": 4}, {"prompt": "", "label": 7}]
    by_label = Task("prompts", 1, labels, 2, "labels", {"num_classes": 8})
    for name, wanted in (("names", by_name), ("labels", by_label)):
        generate(wanted, runs["ddpm"], tmp_path / name, FAST, ALONE)
    assert digests_of(tmp_path / "names") == digests_of(tmp_path / "labels")


def test_an_autoencoder_that_is_not_there(runs: dict[str, Path], task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="autoencoder 'absent': no such folder"):
        generate(task, runs["flow"], tmp_path / "out", Options(vae="absent"), ALONE)
    assert not (tmp_path / "out").exists()


def test_pixels_are_rounded_and_clipped(tmp_path: Path) -> None:
    values = torch.tensor([-2.0, -1.0, -1 / 255, 0.0, 1 / 255, 1.0, 9.0])
    (png,) = to_png(values[None, None, None].expand(1, 3, 1, 7))
    (tmp_path / "a.png").write_bytes(png)
    assert np.asarray(Image.open(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 0, 127, 128, 128, 255, 255]


def test_export_in_genevals_layout(generated: Callable, tmp_path: Path) -> None:
    folder = generated(num_prompts=3)
    with pytest.raises(ValueError, match="is of task prompts, not geneval"):
        export_geneval(folder, tmp_path / "layout")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"task": {"id": "geneval", "version": 1}}))
    assert export_geneval(folder, tmp_path / "layout") == 3
    names = sorted(str(path.relative_to(tmp_path / "layout")) for path in (tmp_path / "layout").rglob("*.*"))
    assert names[:3] == ["00000/metadata.jsonl", "00000/samples/00000.png", "00000/samples/00001.png"]
    assert len(names) == 9
    (line,) = (tmp_path / "layout" / "00002" / "metadata.jsonl").read_text().splitlines()
    assert json.loads(line) == {"prompt": "a picture of number 2", "category": "category-2"}
    copy = (tmp_path / "layout" / "00002" / "samples" / "00001.png").read_bytes()
    assert copy == units.image_path(folder, 2, 1).read_bytes()
    with pytest.raises(ValueError, match="layout is not empty"):
        export_geneval(folder, tmp_path / "layout")


def test_a_data_set_as_pictures_and_prompts(labelled: Path, tmp_path: Path) -> None:
    exported = export_data(str(labelled), tmp_path / "data")
    records = ChunkReader(str(labelled)).manifest.num_samples
    pictures = Folder(exported.images)
    assert len(pictures.digests) == records and pictures.pixels(0).shape == (16, 16, 3)
    captions = [record["prompt"] for record in load_task("prompts", TaskOptions(exported.prompts)).records]
    assert "cat" in captions and len(set(captions)) == len(captions) <= records
    before = exported.prompts.stat().st_mtime_ns
    assert export_data(str(labelled), tmp_path / "data") == exported
    assert exported.prompts.stat().st_mtime_ns == before
