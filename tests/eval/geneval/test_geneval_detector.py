"""What goes into the detector and what is read out of it, against mmdetection's definitions written out slowly."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional

from megadit.eval.geneval.detector import Detector, instances, prepare
from megadit.eval.geneval.verdicts import CLASS_NAMES

CPU = torch.device("cpu")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# What goes in.


@pytest.mark.parametrize(
    ("image_size", "size", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((640, 480), (800, 1067), (800, 1088)),  # 640 * 800 / 480 = 1066.67
        ((480, 640), (1067, 800), (1088, 800)),
        ((2000, 500), (333, 1333), (352, 1344)),  # the long side decides: 500 * 1333 / 2000 = 333.25
    ],
)
def test_images_fill_800_by_1333(image_size: tuple[int, int], size: tuple[int, int], padded: tuple[int, int]) -> None:
    pixels, found = prepare(Image.new("RGB", image_size))
    assert (found, pixels.shape) == (size, (3, *padded))


def test_pixels_are_normalised_after_padding_with_128() -> None:
    pixels, (height, width) = prepare(Image.new("RGB", (40, 30), (124, 0, 255)))
    inside, outside = pixels[:, :height, :width], pixels[:, :, width:]
    assert outside.numel() > 0
    for channel, (value, mean, std) in enumerate([(124, 123.675, 58.395), (0, 116.28, 57.12), (255, 103.53, 57.375)]):
        assert torch.allclose(inside[channel], torch.tensor((value - mean) / std))
        assert torch.allclose(outside[channel], torch.tensor((128 - mean) / std))


def test_resizing_is_bilinear_between_pixel_centres_without_antialiasing() -> None:
    """Shrinking by 2 takes the mean of the 2 x 2 in the middle of each output pixel; an antialiased one of 4 x 4."""
    image = noise(1600, 1600)
    pixels, _ = prepare(image)
    values = np.asarray(image, dtype=np.float64).transpose(2, 0, 1)
    means = (values[:, ::2, ::2] + values[:, 1::2, ::2] + values[:, ::2, 1::2] + values[:, 1::2, 1::2]) / 4
    found = pixels * torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    found += torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    assert np.abs(found.numpy() - means).max() <= 0.5 + 1e-3  # rounded to whole levels, as uint8 pictures are


# What is read out.


def slow_instances(
    class_logits: Tensor, mask_logits: Tensor, padded: tuple[int, int], size: tuple[int, int], image: tuple[int, int]
) -> list[tuple[int, float, tuple[int, int, int, int], np.ndarray]]:
    """MaskFormerFusionHead.instance_postprocess for 100 detections, pixel by pixel in Python."""
    candidates = []
    for query, row in enumerate(class_logits.double().tolist()):
        total = sum(math.exp(value) for value in row)
        candidates += [(math.exp(value) / total, query, label) for label, value in enumerate(row[:-1])]
    found = []
    for probability, query, label in sorted(candidates, reverse=True)[:100]:
        logits = functional.interpolate(mask_logits[query][None, None], padded, mode="bilinear")
        logits = functional.interpolate(logits[:, :, : size[0], : size[1]], image, mode="bilinear")[0, 0]
        mask = np.array([[value > 0 for value in row] for row in logits.tolist()])
        inside = [1 / (1 + math.exp(-value)) for row in logits.tolist() for value in row if value > 0]
        if inside:
            rows = [y for y in range(image[0]) if mask[y].any()]
            columns = [x for x in range(image[1]) if mask[:, x].any()]
            box = (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
            found.append((label, probability * sum(inside) / len(inside), box, mask))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_detections_equal_the_slow_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    class_logits = 3 * torch.randn(5, 41, generator=generator)
    mask_logits = torch.randn(5, 8, 10, generator=generator) - 1
    sizes = (32, 40), (29, 40), (13, 17)
    found = instances(class_logits, mask_logits, *sizes)
    expected = slow_instances(class_logits, mask_logits, *sizes)
    assert len(found) == len(expected) > 50
    for (label, detection), (right_label, score, box, mask) in zip(found, expected, strict=True):
        assert (label, detection.box) == (right_label, box)
        assert detection.score == pytest.approx(score, rel=1e-5)
        assert detection.mask is not None
        assert np.array_equal(detection.mask, mask)


@given(st.integers(0, 99), st.floats(0, 1))
def test_a_minimum_only_leaves_out(seed: int, minimum: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = 3 * torch.randn(4, 6, generator=generator), torch.randn(4, 4, 4, generator=generator)
    sizes = (8, 8), (8, 8), (5, 5)
    kept = [one for one in instances(*inputs, *sizes) if one[1].score > minimum]
    assert instances(*inputs, *sizes, minimum) == kept


def test_a_box_ends_one_beyond_the_mask() -> None:
    mask_logits = torch.full((1, 8, 8), -9.0)
    mask_logits[0, 2:5, 1:7] = 9.0
    [(label, detection)] = instances(torch.tensor([[9.0, -9.0]]), mask_logits, (8, 8), (8, 8), (8, 8))
    assert (label, detection.box) == (0, (1, 2, 7, 5))


def test_objects_come_by_class_in_the_order_of_the_classes(mmdet_file: Path) -> None:
    image = noise(32, 24)
    objects = Detector.load(mmdet_file, CPU).detect(image, 1e-4)
    assert list(objects) == sorted(objects, key=CLASS_NAMES.index)
    assert len(objects) > 2
    for detections in objects.values():
        for detection in detections:
            assert detection.mask is not None
            assert detection.mask.shape == (24, 32)


# Files.


def test_a_folder_of_transformers_gives_the_same_detections(mmdet_file: Path, tmp_path: Path) -> None:
    detector = Detector.load(mmdet_file, CPU)
    detector.model.save_pretrained(tmp_path / "hf")
    image = noise(32, 32)
    assert Detector.load(tmp_path / "hf", CPU).detect(image, 0.1) == detector.detect(image, 0.1) != {}


def broken(change: Callable[[dict[str, Tensor]], object]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def apply(state: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = dict(state)
        change(changed)
        return changed

    return apply


BROKEN = {
    "missing": (
        broken(lambda state: state.pop("panoptic_head.mask_embed.2.bias")),
        r"1 tensors are missing: .*mask_embedder\.1\.0\.bias",
    ),
    "reshaped": (
        broken(lambda state: state.update({"panoptic_head.mask_embed.2.bias": torch.zeros(5)})),
        r"1 tensors are of another shape: .*mask_embedder\.1\.0\.bias",
    ),
    "unknown": (
        broken(lambda state: state.update({"panoptic_head.extra": torch.zeros(5)})),
        r"panoptic_head\.extra is not a tensor",
    ),
    "surplus": (
        broken(lambda state: state.update({"panoptic_head.pixel_decoder.input_convs.3.conv.bias": torch.zeros(5)})),
        r"1 tensors are unexpected: .*input_projections\.3",
    ),
    "no backbone": (
        lambda state: {name: tensor for name, tensor in state.items() if not name.startswith("backbone")},
        "has a tensor .*patch_embeddings.projection.weight, and this one does not",
    ),
    "other classes": (
        broken(
            lambda state: state.update(
                {"panoptic_head.cls_embed.weight": torch.zeros(4, 32), "panoptic_head.cls_embed.bias": torch.zeros(4)}
            )
        ),
        "a detector of 3 classes; GenEval's has COCO's 80",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_does_not_fit_is_refused(case: str, mmdet_state: dict[str, Tensor], tmp_path: Path) -> None:
    change, message = BROKEN[case]
    path = tmp_path / "broken.pth"
    torch.save({"state_dict": change(mmdet_state)}, path)
    with pytest.raises(ValueError, match=message) as caught:
        Detector.load(path, CPU)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="transformers cannot load a Mask2Former"):
        Detector.load(tmp_path, CPU)
