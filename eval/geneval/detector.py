"""GenEval's object detector: Mask2Former of transformers, fed and read as mmdetection does.

The preprocessing is the test pipeline of mmdet 2's mask2former_r50_lsj_8x2_50e_coco.py, the reading of the outputs
MaskFormerFusionHead.instance_postprocess. transformers' own post_process_instance_segmentation gives other masks and
no boxes. The deformable attention is grid_sample, so there is no compiled operator that could be silently wrong.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import Mask2FormerForUniversalSegmentation
from transformers.utils import logging as transformers_logging

from megadit.eval.geneval.mmdet_keys import config_of, to_transformers
from megadit.eval.geneval.verdicts import CLASS_NAMES, Detection
from megadit.interop.published import read_published

SHORT_SIDE, LONG_SIDE, SIDE_MULTIPLE = 800, 1333, 32
PADDING = 128.0  # of 255, before normalisation
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
MAX_DETECTIONS = 100  # of an image
UNUSED = ("swin.layernorm.", "criterion.empty_weight")  # in transformers' model, in no result


class Detector:
    """A Mask2Former for the 80 classes of COCO, in fp32."""

    def __init__(self, model: Mask2FormerForUniversalSegmentation, device: torch.device) -> None:
        self.device = device
        self.model = model.eval().requires_grad_(False).to(device)

    @staticmethod
    def load(path: Path, device: torch.device) -> "Detector":
        """From a checkpoint file of mmdet 2 or 3 (.pth), or from a folder that transformers wrote.

        Raises ValueError for anything else, for tensors that are missing, unexpected or of another shape, and for a
        model that does not have 80 classes.
        """
        with _quiet():
            model = _from_folder(path) if path.is_dir() else _from_mmdet(path)
        if model.config.num_labels != len(CLASS_NAMES):
            raise ValueError(f"{path}: a detector of {model.config.num_labels} classes; GenEval's has COCO's 80")
        return Detector(model, device)

    @torch.inference_mode()
    def detect(self, image: Image.Image, min_score: float = 0.0) -> dict[str, list[Detection]]:
        """The objects in an RGB image whose score exceeds `min_score`: by class, in the order of CLASS_NAMES."""
        pixels, size = prepare(image)
        class_logits, mask_logits = self.logits(pixels)
        found = instances(class_logits, mask_logits, tuple(pixels.shape[1:]), size, image.size[::-1], min_score)
        objects: dict[str, list[Detection]] = {}
        for label in sorted({label for label, _ in found}):
            objects[CLASS_NAMES[label]] = [detection for other, detection in found if other == label]
        return objects

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [queries, classes + 1] and mask logits [queries, H / 4, W / 4] of an image [3, H, W]."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            output = self.model(pixel_values=pixels[None].to(self.model.device, self.model.dtype))
        return output.class_queries_logits[0], output.masks_queries_logits[0]


def prepare(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """An RGB image as the network takes it, [3, H, W], and its height and width there without the padding.

    As large as fits into 800 x 1333 by the bilinear filter without antialiasing (OpenCV's, whose fixed-point
    arithmetic differs by at most 1 of 255), padded at the right and bottom to multiples of 32.
    """
    width, height = image.size
    scale = min(LONG_SIDE / max(width, height), SHORT_SIDE / min(width, height))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
    resized = functional.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0].round()
    right, bottom = (-size[1] % SIDE_MULTIPLE, -size[0] % SIDE_MULTIPLE)
    return (functional.pad(resized, (0, right, 0, bottom), value=PADDING) - MEAN) / STD, size


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded_size: tuple[int, ...],
    size: tuple[int, int],
    image_size: tuple[int, int],
    min_score: float = 0.0,
) -> list[tuple[int, Detection]]:
    """The detections of an image, with their labels, from the outputs of the network; sizes are (height, width).

    The best 100 of all pairs of a query and a class; a score is the class probability times the mean probability of
    the pixels inside the mask. Boxes enclose masks. Pairs whose class probability does not exceed `min_score` are
    dropped before their masks are computed: their score could not either.
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    num_classes = probabilities.shape[1]
    scores, places = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    places, scores = places[scores > min_score], scores[scores > min_score]
    found = []
    for place, score in zip(places.tolist(), scores, strict=True):
        logits = mask_logits[place // num_classes][None, None]
        logits = functional.interpolate(logits, size=tuple(padded_size), mode="bilinear", align_corners=False)
        logits = logits[..., : size[0], : size[1]]
        logits = functional.interpolate(logits, size=image_size, mode="bilinear", align_corners=False)[0, 0]
        mask = logits > 0
        quality = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        total = float(score * quality)
        if total > min_score:
            found.append((place % num_classes, Detection(_box(mask), total, mask.cpu().numpy())))
    return found


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of the pixels of a mask that has some: x2 and y2 are one beyond the last."""
    rows, columns = (mask.any(dim=dim).nonzero() for dim in (1, 0))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report on tensors that are missing: `_refuse_gaps` knows which of them matter."""
    transformers_logging.disable_progress_bar()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _from_mmdet(path: Path) -> Mask2FormerForUniversalSegmentation:
    try:
        converted = to_transformers(read_published(path, prefer="raw"))
        config = config_of(converted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model, loading = Mask2FormerForUniversalSegmentation.from_pretrained(
        None, config=config, state_dict=converted, ignore_mismatched_sizes=True, output_loading_info=True
    )
    _refuse_gaps(path, loading, unexpected=loading["unexpected_keys"])
    return model


def _from_folder(path: Path) -> Mask2FormerForUniversalSegmentation:
    try:
        model, loading = Mask2FormerForUniversalSegmentation.from_pretrained(
            path, local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: transformers cannot load a Mask2Former: {' '.join(str(error).split())}") from error
    _refuse_gaps(path, loading, unexpected=())  # the published files hold tables that newer releases compute
    return model


def _refuse_gaps(path: Path, loading: dict[str, Any], unexpected: Collection[str]) -> None:
    """transformers fills what a file does not have with random numbers; a detector with any is broken."""
    missing = sorted(name for name in loading["missing_keys"] if not any(part in name for part in UNUSED))
    reshaped = sorted(name for name, *_ in loading["mismatched_keys"])
    for what, names in (("missing", missing), ("of another shape", reshaped), ("unexpected", sorted(unexpected))):
        if names:
            raise ValueError(f"{path}: {len(names)} tensors are {what}: {', '.join(names[:3])}")
