"""The self-test passes with the detector that wrote the golden boxes and fails with broken ones."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.eval.geneval import selftest
from megadit.eval.geneval.detector import Detector
from megadit.eval.geneval.selftest import check_arithmetic, check_golden, record

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def detector(mmdet_file: Path) -> Detector:
    return Detector.load(mmdet_file, CPU)


@pytest.fixture(scope="module")
def recorded(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(folder / f"{seed}.png")
    record(detector, folder)
    return folder


@pytest.fixture
def golden(recorded: Path, tmp_path: Path) -> Path:
    """Pictures with golden.json, to be changed."""
    return shutil.copytree(recorded, tmp_path / "golden")


def changed(detector: Detector, change: Callable[[torch.nn.Module], None]) -> Detector:
    model = copy.deepcopy(detector.model)
    with torch.no_grad():
        change(model)
    return Detector(model, CPU)


def edit(golden: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    content = json.loads((golden / "golden.json").read_text())
    change(content["images"])
    (golden / "golden.json").write_text(json.dumps(content))


def test_the_detector_that_wrote_the_boxes_passes(detector: Detector, golden: Path) -> None:
    assert check_golden(detector, golden) == 2


def blind(model: torch.nn.Module) -> None:
    model.class_predictor.bias[-1] += 9  # "no object"


def renamed(model: torch.nn.Module) -> None:
    model.class_predictor.bias.copy_(model.class_predictor.bias.roll(1))


def unmerged(model: torch.nn.Module) -> None:
    """Patch merging in the checkpoint's own order of channels: what a conversion by names alone would give."""
    merging = model.model.pixel_level_module.encoder.swin.encoder.layers[0].downsample
    merging.norm.weight.copy_(merging.norm.weight.roll(7))
    merging.reduction.weight.copy_(merging.reduction.weight.roll(7, dims=1) * 3)


@pytest.mark.parametrize("fault", [blind, renamed, unmerged])
def test_a_broken_detector_fails(detector: Detector, golden: Path, fault: Callable[[torch.nn.Module], None]) -> None:
    with pytest.raises(ValueError, match=r"^the detector is broken: on the golden images of .*, [01]\.png: no dog of "):
        check_golden(changed(detector, fault), golden)


def test_boxes_may_differ_by_a_fiftieth_and_scores_by_a_twentieth(detector: Detector, golden: Path) -> None:
    def shift(images: list[dict[str, Any]], pixels: float, score: float) -> None:
        first = images[0]["objects"][0]
        first["box"][0] += pixels
        first["score"] += score

    edit(golden, lambda images: shift(images, 0.9, 0.04))  # of 48 pixels
    assert check_golden(detector, golden) == 2
    edit(golden, lambda images: shift(images, 0.2, 0))
    with pytest.raises(ValueError, match="broken"):
        check_golden(detector, golden)
    edit(golden, lambda images: shift(images, -1.1, 0.02))
    with pytest.raises(ValueError, match="broken"):
        check_golden(detector, golden)


def test_golden_images_that_prove_nothing_are_refused(detector: Detector, golden: Path) -> None:
    with pytest.raises(ValueError, match=r"no object above 0\.35 in any of 2 pictures"):
        record(changed(detector, blind), golden)

    def doubt(images: list[dict[str, Any]]) -> None:
        for one in [one for image in images for one in image["objects"]]:
            one["score"] = 0.35

    edit(golden, doubt)
    with pytest.raises(ValueError, match="a blind detector would pass"):
        check_golden(detector, golden)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not a list of golden images"),
        ('{"images": [{"file": "0.png"}]}', "not a list of golden images: KeyError"),
        (
            '{"images": [{"file": "0.png", "objects": [{"class": "unicorn", "box": [0, 0, 1, 1], "score": 0.9}]}]}',
            "'unicorn' is not one of the detector's classes",
        ),
        (
            '{"images": [{"file": "9.png", "objects": [{"class": "dog", "box": [0, 0, 1, 1], "score": 0.9}]}]}',
            "9.png: not a picture",
        ),
    ],
)
def test_a_bad_golden_folder_is_named(detector: Detector, golden: Path, content: str | None, message: str) -> None:
    (golden / "golden.json").unlink()
    if content is not None:
        (golden / "golden.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        check_golden(detector, golden)


def test_wrong_arithmetic_fails_without_golden_images(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "DRAWN_SIZE", 64)
    assert check_arithmetic(detector) < 1e-4

    def wrong(layer: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        """An operator that is wrong in the job's precision only, as one that was built for another device."""
        return output.roll(1, dims=1) if output.dtype == torch.float32 else output

    def miscompile(model: torch.nn.Module) -> None:
        model.model.pixel_level_module.decoder.encoder.layers[0].self_attn.output_proj.register_forward_hook(wrong)

    def overflow(model: torch.nn.Module) -> None:
        """The masks alone are not a number."""
        model.get_parameter("model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.bias")[0] = torch.nan

    for fault in (miscompile, overflow):
        with pytest.raises(ValueError, match="^the detector is broken on cpu: its logits differ"):
            check_arithmetic(changed(detector, fault))
