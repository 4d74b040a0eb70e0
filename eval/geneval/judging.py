"""The GenEval score of a folder of generated images: judge every image, then sum up.

`geneval` is the benchmark's own detector (mmdetection's weights); `geneval-hf` has Meta's weights of the same
architecture, which is another judge whose scores compare with their own kind only.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megadit.distributed import Topology
from megadit.eval.geneval.colours import ColourClassifier
from megadit.eval.geneval.detector import Detector
from megadit.eval.geneval.rows import Row, Rows
from megadit.eval.geneval.selftest import check_arithmetic, check_golden, record
from megadit.eval.geneval.summary import results_line, summarise
from megadit.eval.geneval.verdicts import Prompt, Thresholds, judge, parse_prompt, select
from megadit.eval.picture_sets import Generated, fingerprint
from megadit.eval.units import Unit, read_manifest, read_prompts
from megadit.eval.weights import Located, WeightFile, WeightFolder, Weights
from megadit.files import write_text

logger = logging.getLogger(__name__)

VERSION = 1
PROMPTS_BY_TAG = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
IMAGES_PER_PROMPT = 4
LOG_SECONDS = 30

MMDET = "mask2former_swin-s-p4-w7-224"
MMDET_2 = WeightFile(
    f"{MMDET}_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
    "743b7d99",
    f"mmdetection 2, configs/mask2former/{MMDET}_lsj_8x2_50e_coco.py",
    other_names=(f"{MMDET}_lsj_8x2_50e_coco.pth",),  # what GenEval's download_models.sh calls it
)
MMDET_3 = WeightFile(
    f"{MMDET}_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
    "c9d0c4f2",
    f"mmdetection 3, configs/mask2former/{MMDET}_8xb2-lsj-50e_coco.py",
)
META = WeightFolder(
    "mask2former-swin-small-coco-instance",
    "facebook/mask2former-swin-small-coco-instance",
    {"model_type": "mask2former", "num_labels": 80, "backbone_config.embed_dim": 96},
)
CLIP = WeightFolder(
    "clip-vit-large-patch14",
    "openai/clip-vit-large-patch14",
    {"vision_config.hidden_size": 1024, "vision_config.patch_size": 14, "vision_config.image_size": 224},
)


@dataclass(frozen=True)
class Protocol:
    """What the name of a metric stands for."""

    detectors: tuple[Weights, ...]  # files with the same weights: the first that is there is taken
    colours: Weights = CLIP
    prompts_by_tag: Mapping[str, int] = field(default_factory=lambda: PROMPTS_BY_TAG)
    images_per_prompt: int = IMAGES_PER_PROMPT
    thresholds: Thresholds = field(default_factory=Thresholds)


PROTOCOLS = {"geneval": Protocol((MMDET_2, MMDET_3)), "geneval-hf": Protocol((META,))}


@dataclass(frozen=True)
class _Task:
    """A complete folder of GenEval's images."""

    pictures: Generated
    prompts: list[Prompt]
    metadata: list[dict[str, Any]]


def score_geneval(
    folder: Path, weights: Path, metric: str, topology: Topology, protocol: Protocol | None = None
) -> dict[str, Any]:
    """Judge the images of `folder` and write scores/METRIC.json, the rows and results.jsonl beside it.

    Ranks share the work. What was judged before by the same networks is not judged again. Raises ValueError, on every
    rank, unless every image of every prompt is there, and if weights are missing or the self-test fails.
    """
    protocol = protocol or PROTOCOLS[metric]
    task = topology.on_first(lambda: _read_task(folder, protocol))
    located = topology.on_first(lambda: _locate(weights, protocol))
    sha256 = {name: digest for place in located for name, digest in place.sha256.items()}
    rows = Rows(folder / "scores" / f"{metric}.rows", _judge_id(sha256, protocol), task.pictures.units)
    missing = topology.on_first(rows.missing)

    def judge_share() -> dict[str, Any]:
        detector = Detector.load(located[0].path, topology.device)
        colours = ColourClassifier.load(located[1].path, topology.device)
        tested = _self_test(detector, golden_folder(weights, metric), topology)
        _judge(detector, colours, task, rows, missing[topology.rank :: topology.size], protocol.thresholds, topology)
        return tested

    tested = topology.on_every(judge_share)[0]

    def finish() -> dict[str, Any]:
        judged = rows.read()
        score = {"metric": metric, "version": VERSION, "higher_is_better": True, "weights": sha256}
        score |= summarise(judged, [prompt.tag for prompt in task.prompts])
        settings = asdict(protocol.thresholds) | {"self_test": tested, "pictures": fingerprint(task.pictures)}
        score |= {"settings": settings, "rows": f"{metric}.jsonl"}
        _write(folder / "scores", metric, score, task, judged)
        return score

    return topology.on_first(finish)


def golden_folder(weights: Path, metric: str) -> Path:
    """Where the golden images of a metric's detector are: another detector finds other boxes."""
    return weights / f"{metric}-golden"


def record_golden(weights: Path, metric: str, device: torch.device, protocol: Protocol | None = None) -> Path:
    """Write golden.json for the pictures in `golden_folder`, as the metric's detector sees them on this machine.

    From then on every score with these weights checks the detector against it. Raises ValueError where there are no
    pictures, or nothing is found in them, and where the weights are missing or the detector's arithmetic is wrong.
    """
    protocol, folder = protocol or PROTOCOLS[metric], golden_folder(weights, metric)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; put pictures of some of the detector's classes into it")
    detector = Detector.load(_locate_detector(weights, protocol).path, device)
    check_arithmetic(detector)
    return record(detector, folder)


def _read_task(folder: Path, protocol: Protocol) -> _Task:
    """The images and demands of a folder. Raises ValueError unless it is the whole benchmark."""
    records = read_prompts(folder)
    source = folder / "prompts.jsonl"
    prompts = [parse_prompt(record, f"{source} line {line}") for line, record in enumerate(records, start=1)]
    found = {tag: sum(prompt.tag == tag for prompt in prompts) for tag in protocol.prompts_by_tag}
    if found != protocol.prompts_by_tag or len(prompts) != sum(found.values()):
        raise ValueError(
            f"{source} is not GenEval: it has {len(prompts)} prompts ({_listed(found)}), "
            f"not {sum(protocol.prompts_by_tag.values())} ({_listed(protocol.prompts_by_tag)})"
        )
    images_per_prompt = read_manifest(folder)["images_per_prompt"]
    if images_per_prompt != protocol.images_per_prompt:
        raise ValueError(f"{folder} has {images_per_prompt} images a prompt; GenEval has {protocol.images_per_prompt}")
    pictures = Generated(folder)  # refuses a folder with a unit missing
    metadata = [{key: value for key, value in record.items() if key != "index"} for record in records]
    return _Task(pictures, prompts, metadata)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{tag} {count}" for tag, count in counts.items())


def _locate(weights: Path, protocol: Protocol) -> tuple[Located, Located]:
    return _locate_detector(weights, protocol), protocol.colours.locate(weights)


def _locate_detector(weights: Path, protocol: Protocol) -> Located:
    there = [file for file in protocol.detectors if (weights / file.name).exists()]
    return (there or protocol.detectors)[0].locate(weights)


def _judge_id(sha256: Mapping[str, str], protocol: Protocol) -> str:
    """Sixteen digits for everything that decides on an image."""
    basis = json.dumps([VERSION, sorted(sha256.values()), asdict(protocol.thresholds)])
    return hashlib.sha256(basis.encode()).hexdigest()[:16]


def _self_test(detector: Detector, golden: Path, topology: Topology) -> dict[str, Any]:
    """What was checked, for the report. Raises ValueError when the detector is broken."""
    error = check_arithmetic(detector)
    num_golden = check_golden(detector, golden) if golden.is_dir() else 0
    if not num_golden and topology.is_first:
        logger.warning(
            "%s does not exist: no golden images (see `megadit eval geneval-golden`), so a detector that finds too "
            "little would not be noticed",
            golden,
        )
    return {"golden_images": num_golden, "arithmetic_error": error}


def _judge(
    detector: Detector,
    colours: ColourClassifier,
    task: _Task,
    rows: Rows,
    units: Sequence[Unit],
    thresholds: Thresholds,
    topology: Topology,
) -> None:
    places = {(unit.prompt, unit.image): place for place, unit in enumerate(task.pictures.units)}
    began = logged = time.monotonic()
    with rows.writer(topology) as append:
        for done, unit in enumerate(units, start=1):
            image = Image.fromarray(task.pictures.pixels(places[unit.prompt, unit.image]))
            append(_row(detector, colours, image, unit, task.prompts[unit.prompt], thresholds))
            if topology.is_first and time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                logger.info("%d of %d images, %.2f images/s a rank", done, len(units), done / (logged - began))


def _row(
    detector: Detector,
    colours: ColourClassifier,
    image: Image.Image,
    unit: Unit,
    prompt: Prompt,
    thresholds: Thresholds,
) -> Row:
    candidates = detector.detect(image, min(thresholds.score, thresholds.counting_score))
    objects = select(candidates, prompt.tag, thresholds)
    verdict = judge(prompt, objects, partial(colours.classify, image), thresholds)
    details = {name: [[*one.box, one.score] for one in found] for name, found in objects.items()}
    return {
        "prompt": unit.prompt,
        "image": unit.image,
        "sha256": unit.sha256,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "details": details,
    }


def _write(scores: Path, metric: str, score: dict[str, Any], task: _Task, rows: Sequence[Row]) -> None:
    """METRIC.jsonl, METRIC.results.jsonl (GenEval's own format) and, last, METRIC.json."""
    lines = [
        results_line(row, unit, task.metadata[unit.prompt]) for row, unit in zip(rows, task.pictures.units, strict=True)
    ]
    write_text(scores / f"{metric}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(scores / f"{metric}.results.jsonl", "".join(lines))
    write_text(scores / f"{metric}.json", json.dumps(score, indent=1) + "\n")
