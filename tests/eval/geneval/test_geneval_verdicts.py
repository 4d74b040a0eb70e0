"""GenEval's rules against tables computed by hand and against definitions in another form: counted pixels for overlap,
angles and exact fractions for positions, a recursive definition for whole prompts."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from megadit.eval.geneval.verdicts import (
    CLASS_NAMES,
    COLOURS,
    TAGS,
    Detection,
    Prompt,
    Thresholds,
    judge,
    overlap,
    parse_prompt,
    relative_position,
    select,
)

Box = tuple[float, float, float, float]


def object_at(x: float = 0, y: float = 0, width: float = 10, height: float = 10, score: float = 0.95) -> Detection:
    return Detection((x, y, x + width, y + height), score)


def prompt_of(include: list[dict[str, Any]], exclude: Sequence[dict[str, Any]] = (), tag: str = "position") -> Prompt:
    return parse_prompt({"tag": tag, "prompt": "a photo", "include": include, "exclude": list(exclude)}, "test")


def no_colours(class_name: str, detections: Sequence[Detection]) -> list[str]:
    raise AssertionError("colours were asked for without a demand")


boxes = st.builds(
    lambda x, y, width, height: (x, y, x + width, y + height),
    *[st.integers(0, 40)] * 2,
    *[st.integers(1, 20)] * 2,
)


def test_class_names_are_cocos_with_three_renamed() -> None:
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 80
    assert {"computer mouse", "tv remote", "computer keyboard"} < set(CLASS_NAMES)
    places = {"person": 0, "traffic light": 9, "banana": 46, "computer mouse": 64, "toothbrush": 79}
    assert {name: CLASS_NAMES.index(name) for name in places} == places


# Which detections count.


@pytest.mark.parametrize("tag", TAGS)
def test_a_score_must_exceed_the_threshold_of_its_tag(tag: str) -> None:
    threshold = np.float32(0.9 if tag == "counting" else 0.3)
    above = float(np.nextafter(threshold, np.float32(1)))
    kept = select({"dog": [object_at(score=float(threshold)), object_at(score=above)]}, tag)
    assert kept == {"dog": [object_at(score=above)]}


def test_a_class_without_objects_above_the_threshold_is_left_out() -> None:
    assert select({"dog": [object_at(score=0.2)], "cat": []}, "colors") == {}


@given(st.lists(st.integers(0, 100), max_size=40))
def test_the_surest_sixteen_come_in_order(percents: list[int]) -> None:
    candidates = [object_at(x=place, score=percent / 100) for place, percent in enumerate(percents)]
    kept = select({"dog": candidates}, "two_object").get("dog", [])
    expected = sorted((percent for percent in percents if percent > 30), reverse=True)[:16]
    assert [round(detection.score * 100) for detection in kept] == expected
    assert all(detection in candidates for detection in kept)


def test_of_seventeen_the_least_sure_goes() -> None:
    seventeen = [object_at(x=place, score=0.9 - place / 100) for place in range(17)]
    assert select({"dog": seventeen}, "single_object")["dog"] == seventeen[:16]


def test_an_overlap_of_exactly_the_limit_is_too_much() -> None:
    halves = [Detection((0, 0, 9, 9), 0.9), Detection((0, 0, 9, 4), 0.8)]  # 50 of 100 pixels
    assert select({"dog": halves}, "colors", Thresholds(max_overlap=0.5))["dog"] == halves[:1]
    assert select({"dog": halves}, "colors", Thresholds(max_overlap=0.51))["dog"] == halves


def test_overlapping_boxes_stay_unless_suppression_is_asked_for() -> None:
    twins = [object_at(score=0.9), object_at(score=0.8)]
    assert select({"dog": twins}, "colors")["dog"] == twins
    assert select({"dog": twins}, "colors", Thresholds(max_overlap=0.99))["dog"] == twins[:1]


@given(boxes, boxes)
def test_overlap_counts_the_last_row_and_column_as_inside(a: Box, b: Box) -> None:
    def pixels(box: Box) -> set[tuple[int, int]]:
        x1, y1, x2, y2 = map(int, box)
        return {(x, y) for x in range(x1, x2 + 1) for y in range(y1, y2 + 1)}

    first, second = pixels(a), pixels(b)
    assert overlap(Detection(a, 1), Detection(b, 1)) == pytest.approx(len(first & second) / len(first | second))


def test_boxes_that_touch_in_one_pixel_overlap_in_it() -> None:
    touching = Detection((0, 0, 9, 9), 1), Detection((9, 9, 18, 18), 1)
    assert overlap(*touching) == pytest.approx(1 / 199)
    assert overlap(Detection((0, 0, 9, 9), 1), Detection((10, 0, 19, 9), 1)) == 0


@given(st.lists(boxes, min_size=1, max_size=12), st.sampled_from([0.2, 0.5, 0.8]))
def test_suppression_keeps_a_box_exactly_if_no_surer_kept_one_overlaps(found: list[Box], limit: float) -> None:
    ranked = [Detection(box, 0.99 - place / 100) for place, box in enumerate(found)]
    kept = select({"dog": ranked}, "colors", Thresholds(max_overlap=limit))["dog"]
    for detection in ranked:
        surer = [other for other in kept if other.score > detection.score]
        assert (detection in kept) == all(overlap(other, detection) < limit for other in surer)


# Where one object is seen from another.

POSITIONS = {
    # offset of the centres, size of both boxes: margins are 0.1 * (10 + 10) = 2 pixels an axis
    "far right": ((100, 0), 10, {"right of"}),
    "far left": ((-100, 0), 10, {"left of"}),
    "above: y grows downwards": ((0, -100), 10, {"above"}),
    "below": ((0, 100), 10, {"below"}),
    "diagonal: both, (50-2)/70.7 = 0.68": ((50, 50), 10, {"right of", "below"}),
    "up left": ((-50, -50), 10, {"left of", "above"}),
    "60 degrees: (50-2)/100 = 0.48 in x": ((50, 86.6), 10, {"below"}),
    "same centre": ((0, 0), 10, set()),
    "inside both margins": ((2, 2), 10, set()),
    "3 pixels right: (3-2)/3 = 0.33": ((3, 0), 10, set()),
    "4 pixels right: (4-2)/4 = 0.5 is not more": ((4, 0), 10, set()),
    "5 pixels right: (5-2)/5 = 0.6": ((5, 0), 10, {"right of"}),
    "the same to the left": ((-4, 0), 10, set()),
    "the same above": ((0, -4), 10, set()),
    "the same below": ((0, 4), 10, set()),
    "points nearer than a thousandth of a pixel": ((0.0009, 0), 0, set()),
    "points a little farther": ((0.0011, 0), 0, {"right of"}),
    "unshrunk length: (5-2)/6.4 = 0.47 in x, (4-2)/6.4 in y": ((5, 4), 10, set()),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_positions_computed_by_hand(case: str) -> None:
    (x, y), size, expected = POSITIONS[case]
    target = object_at(200, 200, size, size)
    assert relative_position(object_at(200 + x, 200 + y, size, size), target) == expected


@given(st.floats(-math.pi, math.pi), st.floats(1, 1000))
def test_points_are_right_left_above_below_within_60_degrees(angle: float, distance: float) -> None:
    degrees = math.degrees(angle)
    assume(all(abs(abs(degrees) - limit) > 0.01 for limit in (30, 60, 120, 150)))
    x, y = distance * math.cos(angle), distance * math.sin(angle)
    expected = {
        name
        for name, direction in (("right of", 0), ("below", 90), ("left of", 180), ("above", -90))
        if abs((degrees - direction + 180) % 360 - 180) < 60
    }
    assert relative_position(object_at(x, y, 0, 0), object_at(0, 0, 0, 0)) == expected


def exact_position(a: Box, b: Box) -> set[str] | None:
    """The rule in fractions, squared so that no root is needed; None on a tie."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    offsets = Fraction(ax1 + ax2 - bx1 - bx2, 2), Fraction(ay1 + ay2 - by1 - by2, 2)
    margins = Fraction(ax2 - ax1 + bx2 - bx1, 10), Fraction(ay2 - ay1 + by2 - by1, 10)
    length_squared = sum(offset**2 for offset in offsets)
    found = set()
    for offset, margin, names in zip(offsets, margins, (("left of", "right of"), ("above", "below")), strict=True):
        reach = abs(offset) - margin
        if reach > 0 and 4 * reach**2 == length_squared:
            return None
        if reach > 0 and 4 * reach**2 > length_squared:
            found.add(names[offset > 0])
    return found


@given(boxes, boxes)
def test_positions_equal_the_rule_in_exact_fractions(a: Box, b: Box) -> None:
    expected = exact_position(a, b)
    assume(expected is not None)
    assert relative_position(Detection(a, 1), Detection(b, 1)) == expected


# Whole prompts.

DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
CAT_LEFT_OF_DOG = [DOG, CAT | {"position": ["left of", 0]}]
RED_DOG = [DOG | {"color": "red"}]
CASES: dict[str, tuple[list, list, dict[str, list[Detection]], dict[str, list[str]], str]] = {
    # include, exclude, objects, colours, reason ("" is correct)
    "found": ([DOG], [], {"dog": [object_at()]}, {}, ""),
    "more than enough": ([DOG], [], {"dog": [object_at()] * 5}, {}, ""),
    "absent": ([DOG], [], {"cat": [object_at()]}, {}, "expected dog>=1, found 0"),
    "too few": ([DOG | {"count": 3}], [], {"dog": [object_at()] * 2}, {}, "expected dog>=3, found 2"),
    "one of two absent": ([DOG, CAT], [], {"cat": [object_at()]}, {}, "expected dog>=1, found 0"),
    "both absent": ([DOG, CAT], [], {}, {}, "expected dog>=1, found 0\nexpected cat>=1, found 0"),
    "exact count": ([DOG | {"count": 2}], [DOG | {"count": 3}], {"dog": [object_at()] * 2}, {}, ""),
    "too many": (
        [DOG | {"count": 2}], [DOG | {"count": 3}], {"dog": [object_at()] * 4}, {}, "expected dog<3, found 4",
    ),
    "right colour": (RED_DOG, [], {"dog": [object_at()]}, {"dog": ["red"]}, ""),
    "wrong colour": (
        RED_DOG, [], {"dog": [object_at()]}, {"dog": ["blue"]}, "expected red dog>=1, found 0 red; and 1 blue",
    ),
    "one of two coloured": (
        [DOG | {"color": "red", "count": 2}], [], {"dog": [object_at()] * 2}, {"dog": ["green", "red"]},
        "expected red dog>=2, found 1 red; and 1 red, 1 green",
    ),
    "only the surest is looked at": (
        RED_DOG, [], {"dog": [object_at(), object_at()]}, {"dog": ["blue", "red"]},
        "expected red dog>=1, found 0 red; and 1 blue",
    ),
    "right place": (CAT_LEFT_OF_DOG, [], {"dog": [object_at(50)], "cat": [object_at()]}, {}, ""),
    "wrong place": (
        CAT_LEFT_OF_DOG, [], {"dog": [object_at()], "cat": [object_at(50)]}, {},
        "expected cat left of target, found right of target",
    ),
    "two directions": (
        CAT_LEFT_OF_DOG, [], {"dog": [object_at()], "cat": [object_at(50, 50)]}, {},
        "expected cat left of target, found below and right of target",
    ),
    "no direction": (
        CAT_LEFT_OF_DOG, [], {"dog": [object_at()], "cat": [object_at()]}, {},
        "expected cat left of target, found no clear relation to target",
    ),
    "place without its target": (
        CAT_LEFT_OF_DOG, [], {"cat": [object_at()]}, {},
        "expected dog>=1, found 0\nno target for cat to be left of",
    ),
    "a target of the wrong colour is none": (
        [DOG | {"color": "red"}, CAT | {"position": ["left of", 0]}], [],
        {"dog": [object_at(50)], "cat": [object_at()]}, {"dog": ["white"]},
        "expected red dog>=1, found 0 red; and 1 white\nno target for cat to be left of",
    ),
    "colour before place": (
        [DOG, CAT | {"color": "red", "position": ["left of", 0]}], [],
        {"dog": [object_at()], "cat": [object_at(50)]}, {"cat": ["pink"]},
        "expected red cat>=1, found 0 red; and 1 pink",
    ),
    "every object from every target": (
        [DOG | {"count": 2}, CAT | {"count": 2, "position": ["left of", 0]}], [],
        {"dog": [object_at(50), object_at(90)], "cat": [object_at(), object_at(70)]}, {},
        "expected cat left of target, found right of target",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_prompts_judged_by_hand(case: str) -> None:
    include, exclude, objects, colours, reason = CASES[case]

    def colours_of(class_name: str, detections: Sequence[Detection]) -> list[str]:
        return colours[class_name][: len(detections)]

    assert judge(prompt_of(include, exclude), objects, colours_of if colours else no_colours) == (not reason, reason)


class World:
    """Random prompts and pictures over two classes, with a colour fixed for each box."""

    names = ("dog", "cat")
    small = st.integers(0, 4)
    objects = st.dictionaries(st.sampled_from(names), st.lists(boxes.map(lambda box: Detection(box, 1)), max_size=4))
    clauses = st.lists(
        st.fixed_dictionaries(
            {"class": st.sampled_from(names), "count": st.integers(1, 3)},
            optional={"color": st.sampled_from(COLOURS[:2]), "relation": st.sampled_from(["left of", "above"])},
        ),
        min_size=1,
        max_size=3,
    )
    exclude = st.lists(st.fixed_dictionaries({"class": st.sampled_from(names), "count": st.integers(1, 5)}), max_size=1)

    @staticmethod
    def colour(detection: Detection) -> str:
        return COLOURS[int(sum(detection.box)) % 2]


@given(World.clauses, World.exclude, World.objects, st.data())
def test_prompts_equal_the_recursive_definition(
    clauses: list[dict[str, Any]],
    exclude: list[dict[str, Any]],
    objects: dict[str, list[Detection]],
    data: st.DataObject,
) -> None:
    include = []
    for place, clause in enumerate(clauses):
        relation = clause.pop("relation", None)
        target = data.draw(st.integers(0, place - 1)) if relation and place else None
        include.append(clause | ({"position": [relation, target]} if target is not None else {}))

    def holds(place: int) -> bool:
        clause = include[place]
        chosen = objects.get(clause["class"], [])[: clause["count"]]
        relation, target = clause.get("position", (None, None))
        return (
            len(chosen) == clause["count"]
            and all(World.colour(one) == clause.get("color", World.colour(one)) for one in chosen)
            and (
                relation is None
                or (
                    holds(target)
                    and all(
                        relation in relative_position(one, other)
                        for one in chosen
                        for other in objects[include[target]["class"]][: include[target]["count"]]
                    )
                )
            )
        )

    allowed = all(len(objects.get(rule["class"], [])) < rule["count"] for rule in exclude)
    verdict = judge(prompt_of(include, exclude), objects, lambda _, found: [World.colour(one) for one in found])
    assert verdict.correct == (allowed and all(holds(place) for place in range(len(include))))
    assert verdict.correct == (verdict.reason == "")


# Metadata.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "colour"}, "tag: Input should be 'single_object'"),
        ({"include": []}, "include: Tuple should have at least 1 item"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "'unicorn' is not one of the detector's 80 classes"),
        ({"include": [{"class": "dog", "count": 0}]}, "include.0.count: Input should be greater than 0"),
        ({"include": [DOG | {"color": "grey"}]}, "include.0.color: Input should be 'red'"),
        ({"include": [DOG | {"position": ["left of", 0]}]}, "the target of include[0] is 0, not an earlier clause"),
        ({"include": [DOG, CAT | {"position": ["near", 0]}]}, "include.1.position.0: Input should be 'left of'"),
        ({"include": [DOG | {"colour": "red"}]}, "include.0.colour: Extra inputs"),
    ],
)
def test_metadata_that_is_not_genevals_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    record = {"tag": "colors", "prompt": "a photo of a dog", "include": [DOG]}
    with pytest.raises(ValueError, match="^prompts.jsonl line 3: not GenEval metadata: ") as caught:
        parse_prompt(record | change, "prompts.jsonl line 3")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
