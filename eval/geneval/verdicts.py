"""GenEval's decisions: which detections count, and whether an image shows what its prompt asks for.

Pure functions on boxes, scores and masks. The rules and the default thresholds are those of evaluate_images.py of
djghosh13/geneval, revision af4902f, whose numbers are float32; so are ours, so that ties fall the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Relation = Literal["left of", "right of", "above", "below"]
TAGS: tuple[str, ...] = get_args(Tag)
COLOURS: tuple[str, ...] = get_args(Colour)

# The order is COCO's, with GenEval's names for mouse, remote and keyboard.
CLASS_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
CLEAR_OFFSET_PIXELS = 1e-3  # boxes whose shrunk offset is below it have no relation
CLEAR_DIRECTION = 0.5  # of the unit vector between centres


@dataclass(frozen=True)
class Thresholds:
    """GenEval's options. Scores must exceed `score` (`counting_score` for the tag counting)."""

    score: float = 0.3
    counting_score: float = 0.9
    max_objects: int = 16  # of a class
    max_overlap: float = 1.0  # the IoU from which the weaker of two boxes goes; 1 turns suppression off
    position_margin: float = 0.1  # of the sum of both sizes, by axis, that an offset must exceed to count


@dataclass(frozen=True)
class Detection:
    """An object: box (x1, y1, x2, y2) in pixels, score in [0, 1], mask bool [H, W] of the image where there is one."""

    box: tuple[float, float, float, float]
    score: float
    mask: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)


class Verdict(NamedTuple):
    """Whether an image is correct and, if not, why: one line for each unmet demand."""

    correct: bool
    reason: str


class _Objects(BaseModel):
    """A number of objects of a class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    class_name: str = Field(alias="class")
    count: PositiveInt

    @field_validator("class_name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in CLASS_NAMES:
            raise ValueError(f"{name!r} is not one of the detector's {len(CLASS_NAMES)} classes")
        return name


class Exclude(_Objects):
    """Fewer than `count` objects of a class."""


class Include(_Objects):
    """At least `count` objects of a class, of a colour, at a place relative to the objects of an earlier clause."""

    color: Colour | None = None
    position: tuple[Relation, NonNegativeInt] | None = None


class Prompt(BaseModel):
    """A line of GenEval's evaluation_metadata.jsonl; other fields are ignored."""

    model_config = ConfigDict(frozen=True)

    tag: Tag
    prompt: str
    include: tuple[Include, ...] = Field(min_length=1)
    exclude: tuple[Exclude, ...] = ()

    @model_validator(mode="after")
    def _earlier_targets(self) -> Self:
        for place, clause in enumerate(self.include):
            if clause.position is not None and clause.position[1] >= place:
                raise ValueError(f"the target of include[{place}] is {clause.position[1]}, not an earlier clause")
        return self


ColoursOf = Callable[[str, Sequence[Detection]], Sequence[str]]
"""The colour of each of some detections of a class."""


def parse_prompt(record: Mapping[str, Any], source: str) -> Prompt:
    """A prompt's demands from its metadata; `source` says in errors where that is. Raises ValueError."""
    try:
        return Prompt.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{source}: not GenEval metadata: {place + ': ' if place else ''}{first['msg']}") from None


def select(
    candidates: Mapping[str, Sequence[Detection]], tag: str, thresholds: Thresholds = Thresholds()
) -> dict[str, list[Detection]]:
    """The detections that count for an image of a tag: by class, the surest first. Classes with none are left out."""
    minimum = np.float32(thresholds.counting_score if tag == "counting" else thresholds.score)
    selected = {}
    for class_name, detections in candidates.items():
        scores = np.array([detection.score for detection in detections], dtype=np.float32)
        order = np.argsort(scores, kind="stable")[::-1]  # of equal scores the last comes first, as upstream
        ranked = [detections[place] for place in order if scores[place] > minimum][: thresholds.max_objects]
        if ranked:
            selected[class_name] = _suppress(ranked, thresholds.max_overlap)
    return selected


def _suppress(ranked: Sequence[Detection], max_overlap: float) -> list[Detection]:
    if max_overlap == 1:
        return list(ranked)
    kept: list[Detection] = []
    for detection in ranked:
        if all(overlap(other, detection) < max_overlap for other in kept):
            kept.append(detection)
    return kept


def overlap(a: Detection, b: Detection) -> float:
    """Intersection over union of two boxes whose last row and column of pixels are inside: sides are one longer."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    first, last = np.maximum(a.box[:2], b.box[:2]), np.minimum(a.box[2:], b.box[2:])
    intersection = area(*first, *last)
    union = area(*a.box) + area(*b.box) - intersection
    return intersection / union if union else 0.0


def relative_position(a: Detection, b: Detection, margin: float = Thresholds.position_margin) -> frozenset[str]:
    """Where `a` is seen from `b`: up to two of left of, right of, above, below; y grows downwards.

    The offset between centres, shrunk by `margin` of both sizes, over the length of the unshrunk offset.
    """
    corners = np.array([a.box, b.box], dtype=np.float32).reshape(2, 2, 2)  # box, corner, axis
    offset = np.subtract(*corners.mean(axis=1))
    sizes = np.abs(corners[:, 1] - corners[:, 0]).sum(axis=0)
    shrunk = np.maximum(np.abs(offset) - np.float32(margin) * sizes, 0) * np.sign(offset)
    if np.all(np.abs(shrunk) < CLEAR_OFFSET_PIXELS):
        return frozenset()
    dx, dy = shrunk / np.linalg.norm(offset)
    found = {
        "left of": dx < -CLEAR_DIRECTION,
        "right of": dx > CLEAR_DIRECTION,
        "above": dy < -CLEAR_DIRECTION,
        "below": dy > CLEAR_DIRECTION,
    }
    return frozenset(relation for relation, holds in found.items() if holds)


def judge(
    prompt: Prompt,
    objects: Mapping[str, Sequence[Detection]],
    colours_of: ColoursOf,
    thresholds: Thresholds = Thresholds(),
) -> Verdict:
    """Whether an image with these objects (of `select`) is what the prompt asks for.

    Only the `count` surest objects of a demanded class are looked at; colours and positions are theirs.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []  # by include clause, for the positions of later ones
    for clause in prompt.include:
        found = objects.get(clause.class_name, [])[: clause.count]
        reason = _unmet(clause, found, matched, colours_of, thresholds)
        matched.append(found if reason is None else None)
        if reason is not None:
            reasons.append(reason)
    for rule in prompt.exclude:
        num_found = len(objects.get(rule.class_name, []))
        if num_found >= rule.count:
            reasons.append(f"expected {rule.class_name}<{rule.count}, found {num_found}")
    return Verdict(not reasons, "\n".join(reasons))


def _unmet(
    clause: Include,
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    colours_of: ColoursOf,
    thresholds: Thresholds,
) -> str | None:
    """The first demand of a clause that is not met."""
    name = clause.class_name
    if len(found) < clause.count:
        return f"expected {name}>={clause.count}, found {len(found)}"
    if clause.color is not None:
        colours = list(colours_of(name, found))
        num_right = colours.count(clause.color)
        if num_right < clause.count:
            seen = ", ".join(f"{colours.count(colour)} {colour}" for colour in COLOURS if colour in colours)
            return f"expected {clause.color} {name}>={clause.count}, found {num_right} {clause.color}; and {seen}"
    if clause.position is None:
        return None
    relation, target = clause.position
    targets = matched[target]
    if targets is None:
        return f"no target for {name} to be {relation}"
    for detection in found:
        for other in targets:
            relations = relative_position(detection, other, thresholds.position_margin)
            if relation not in relations:
                seen = " and ".join(sorted(relations)) or "no clear relation to"
                return f"expected {name} {relation} target, found {seen} target"
    return None
