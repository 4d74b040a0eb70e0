"""Checks that the detector detects, before a score is computed with it.

A detector with wrong weights or a wrong operator does not fail: it finds little, and GenEval comes out near 0.03.

Golden images: a folder with pictures and golden.json, the objects that a trusted detector finds in them. `megadit eval
geneval-golden` writes it; do so where the detector's box AP on COCO was measured. It finds every kind of fault:

    {"images": [{"file": "dog.png", "objects": [{"class": "dog", "box": [x1, y1, x2, y2], "score": 0.98}, ...]}, ...]}

Arithmetic: the logits of a drawn picture, as the job computes them and in float64 on the CPU. It needs no data and
finds wrong operators and lost precision, but not wrong weights; those are known by the SHA-256 of their file.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megadit.eval.geneval.detector import Detector
from megadit.eval.geneval.verdicts import CLASS_NAMES, Detection, Thresholds
from megadit.files import write_text

GOLDEN_FILE = "golden.json"
PICTURES = (".png", ".jpg", ".jpeg")
SCORE_TOLERANCE = 0.05  # mmdet and transformers, GPU and CPU, differ by less than 0.001
MIN_SCORE = Thresholds.score
SURE_SCORE = MIN_SCORE + SCORE_TOLERANCE  # an object above it must be there
BOX_TOLERANCE = 0.02  # of the picture's longer side
LOGIT_TOLERANCE = 0.02  # root mean square, of the logits' standard deviation; fp32 is nearer than 0.001
DRAWN_SIZE = 256  # 45 GFLOP

Objects = list[tuple[str, Detection]]


def read_rgb(path: Path) -> Image.Image:
    """A picture as the detector takes it. Raises ValueError when it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a picture, or a damaged one: {error}") from error


def record(detector: Detector, folder: Path) -> Path:
    """Write golden.json for the pictures in a folder, from a detector that is trusted. Raises ValueError."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    golden = {path.name: _found(detector, path) for path in paths}
    target = folder / GOLDEN_FILE
    _refuse_empty(target, golden)
    images = [{"file": name, "objects": [_plain(*one) for one in objects]} for name, objects in golden.items()]
    write_text(target, json.dumps({"images": images}, indent=1) + "\n")
    return target


def check_golden(detector: Detector, folder: Path) -> int:
    """Compare what the detector finds in the golden pictures with golden.json; the number of pictures.

    Objects between MIN_SCORE and SURE_SCORE may be there or not. Raises ValueError that names the pictures
    and objects that differ.
    """
    golden = _read_golden(folder / GOLDEN_FILE)
    problems = []
    for name, expected in golden.items():
        path = folder / name
        differing = _difference(expected, _found(detector, path), max(read_rgb(path).size))
        problems += [f"{name}: {problem}" for problem in differing]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the detector is broken: on the golden images of {folder}, {'; '.join(problems[:3])}{more}. "
            "A GenEval score of it would mean nothing"
        )
    return len(golden)


def check_arithmetic(detector: Detector) -> float:
    """How far the logits of a drawn picture are from those in float64 on the CPU: the worse of class and mask logits.

    Root mean square over standard deviation. Raises ValueError above LOGIT_TOLERANCE.
    """
    reference = Detector(copy.deepcopy(detector.model).double(), torch.device("cpu"))
    picture = drawn_picture(DRAWN_SIZE)
    pairs = zip(detector.logits(picture), reference.logits(picture), strict=True)
    errors = [(found.cpu() - right).square().mean().sqrt() / right.std() for found, right in pairs]
    worst = float(torch.stack(errors).max())  # of torch, whose maximum of a number and NaN is NaN
    if not worst <= LOGIT_TOLERANCE:  # not a number is no agreement
        raise ValueError(
            f"the detector is broken on {detector.device}: its logits differ from the right ones by {worst:.2g} of "
            f"their standard deviation (allowed: {LOGIT_TOLERANCE}). A GenEval score of it would mean nothing"
        )
    return worst


def drawn_picture(size: int) -> torch.Tensor:
    """A disc on a gradient, normalised, [3, size, size]: no noise, so it is the same on every machine."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    disc = (x.square() + y.square() < 0.3).float()
    return torch.stack([x + disc, y - disc, x * y + 2 * disc])


def _found(detector: Detector, path: Path) -> Objects:
    detected = detector.detect(read_rgb(path), MIN_SCORE)
    return [(name, detection) for name, detections in detected.items() for detection in detections]


def _plain(name: str, detection: Detection) -> dict[str, Any]:
    return {"class": name, "box": list(detection.box), "score": round(detection.score, 4)}


def _read_golden(path: Path) -> dict[str, Objects]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `megadit eval geneval-golden` writes it where the detector is trusted")
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        golden: dict[str, Objects] = {
            image["file"]: [(one["class"], Detection(tuple(one["box"]), one["score"])) for one in image["objects"]]
            for image in images
        }
        unknown = {name for objects in golden.values() for name, _ in objects} - set(CLASS_NAMES)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a list of golden images: {error!r}") from error
    if unknown:
        raise ValueError(f"{path}: {sorted(unknown)[0]!r} is not one of the detector's classes")
    _refuse_empty(path, golden)
    return golden


def _refuse_empty(path: Path, golden: dict[str, Objects]) -> None:
    if all(detection.score <= SURE_SCORE for objects in golden.values() for _, detection in objects):
        raise ValueError(
            f"{path}: no object above {SURE_SCORE} in any of {len(golden)} pictures; a blind detector would pass"
        )


def _difference(expected: Objects, found: Objects, side: int) -> list[str]:
    """What is expected and not found, and found and not expected."""
    left = list(found)
    problems = []
    for name, detection in expected:
        match = next((one for one in left if _same(one, (name, detection), side)), None)
        if match is not None:
            left.remove(match)
        elif detection.score > SURE_SCORE:
            problems.append(f"no {name} of {detection.score:.2f} at {_place(detection)}")
    surplus = [(name, one) for name, one in left if one.score > SURE_SCORE]
    return problems + [f"a {name} of {one.score:.2f} at {_place(one)} is not there" for name, one in surplus]


def _same(one: tuple[str, Detection], other: tuple[str, Detection], side: int) -> bool:
    (name, a), (other_name, b) = one, other
    distance = max(abs(x - y) for x, y in zip(a.box, b.box, strict=True))
    return name == other_name and abs(a.score - b.score) <= SCORE_TOLERANCE and distance <= BOX_TOLERANCE * side


def _place(detection: Detection) -> Sequence[int]:
    return [round(side) for side in detection.box]
