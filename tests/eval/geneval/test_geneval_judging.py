"""The score of whole folders: GenEval's arithmetic, completeness, ranks, and runs that were killed."""

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from megadit.cli import app
from megadit.distributed import ALONE
from megadit.eval.geneval import detector
from megadit.eval.geneval.judging import (
    PROMPTS_BY_TAG,
    PROTOCOLS,
    Protocol,
    golden_folder,
    record_golden,
    score_geneval,
)
from megadit.eval.geneval.rows import Rows
from megadit.eval.geneval.summary import summarise
from megadit.eval.picture_sets import Generated, fingerprint
from megadit.eval.units import complete
from megadit.eval.weights import WeightFile, WeightFolder

CPU = torch.device("cpu")
METRIC = "geneval-tiny"
SHORT_SIDE = 96  # of the detector's pictures, instead of 800: the same way in a tenth of the time
IMAGES_PER_PROMPT = 2
PROMPTS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}]},
    {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]},
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
    },
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "black"}]},
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    },
    {
        "tag": "color_attr",
        "include": [{"class": "dog", "count": 1, "color": "black"}, {"class": "dog", "count": 1, "color": "white"}],
    },
]
PROTOCOL = Protocol(
    detectors=(WeightFile("mask2former.pth", "", "the test"),),
    colours=WeightFolder("clip", "the test"),
    prompts_by_tag=dict.fromkeys(PROMPTS_BY_TAG, 1),
    images_per_prompt=IMAGES_PER_PROMPT,
)


@pytest.fixture(scope="module", autouse=True)
def small_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "SHORT_SIDE", SHORT_SIDE)
        yield


@pytest.fixture(scope="module")
def weights(mmdet_file: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    shutil.copy(mmdet_file, folder)
    shutil.copytree(clip_folder, folder / "clip")
    golden = golden_folder(folder, METRIC)
    golden.mkdir()
    picture(99).save(golden / "patches.png")
    record_golden(folder, METRIC, CPU, PROTOCOL)
    return folder


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)


def generate(folder: Path) -> Path:
    """A finished folder in the form of `megadit eval generate`."""
    (folder / "images" / "000000").mkdir(parents=True)
    (folder / "units").mkdir()
    units = []
    for prompt, image in itertools.product(range(len(PROMPTS)), range(IMAGES_PER_PROMPT)):
        path = folder / "images" / "000000" / f"{prompt:06d}-{image:02d}.png"
        picture(10 * prompt + image).save(path)
        units.append({"prompt": prompt, "image": image, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    (folder / "units" / "rank-0-of-1.jsonl").write_text("".join(json.dumps(unit) + "\n" for unit in units))
    manifest = {"images_per_prompt": IMAGES_PER_PROMPT, "num_units": len(units)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_prompts(folder, PROMPTS)
    return folder


def write_prompts(folder: Path, prompts: list[dict[str, Any]]) -> None:
    lines = [{"index": index, "prompt": f"prompt {index}"} | prompt for index, prompt in enumerate(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("generated"))


@pytest.fixture(scope="module")
def scored(generated: Path, weights: Path) -> dict[str, Any]:
    """The score of `generated`, which has its files afterwards."""
    return score_geneval(generated, weights, METRIC, ALONE, PROTOCOL)


@pytest.fixture
def unscored(generated: Path, tmp_path: Path) -> Path:
    return shutil.copytree(generated, tmp_path / "copy", ignore=shutil.ignore_patterns("scores"))


def files(folder: Path) -> dict[str, bytes]:
    """The results but for the paths that results.jsonl holds."""
    found = {path.name: path.read_bytes() for path in (folder / "scores").iterdir() if path.is_file()}
    return {name: content.replace(str(folder).encode(), b"") for name, content in found.items()}


def num_lines(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in (folder / "scores" / f"{METRIC}.rows").iterdir())


# The arithmetic.


@pytest.mark.parametrize(
    ("percents", "overall"),
    [((97, 38, 35, 76, 4, 6), 0.4267), ((98, 51, 44, 85, 7, 17), 0.5033), ((98, 74, 39, 85, 15, 23), 0.5567)],
)
def test_the_overall_scores_of_genevals_readme(percents: tuple[int, ...], overall: float) -> None:
    """SD 1.5, SD 2.1, SDXL: the overall score is the mean of the tags, however many prompts each has."""
    prompts = [tag for tag, count in PROMPTS_BY_TAG.items() for _ in range(count * 25)]
    rows, seen = [], dict.fromkeys(PROMPTS_BY_TAG, 0)
    shares = dict(zip(PROMPTS_BY_TAG, percents, strict=True))
    for prompt, tag in enumerate(prompts):
        for image in range(4):
            rows.append({"prompt": prompt, "image": image, "correct": seen[tag] % 100 < shares[tag]})
            seen[tag] += 1
    found = summarise(rows, prompts)
    assert found["value"] == pytest.approx(overall, abs=5e-5)
    assert found["groups"] == {tag: pytest.approx(share / 100) for tag, share in shares.items()}
    weighted = sum(PROMPTS_BY_TAG[tag] * share for tag, share in shares.items()) / 553 / 100
    assert found["images_correct"] == pytest.approx(weighted)


def test_the_standard_error_is_that_of_means_of_prompts() -> None:
    generator = np.random.default_rng(0)
    prompts = ["counting"] * 50 + ["colors"] * 200
    rows = [
        {"prompt": prompt, "image": image, "correct": bool(generator.random() < (0.8 if prompt % 2 else 0.3))}
        for prompt in range(250)
        for image in range(4)
    ]
    means = np.array([row["correct"] for row in rows]).reshape(250, 4).mean(axis=1)
    errors = [part.std() / len(part) ** 0.5 for part in (means[:50], means[50:])]
    found = summarise(rows, prompts)
    assert list(found["groups_stderr"].values()) == pytest.approx([errors[0], errors[1]], rel=0.06)
    assert found["stderr"] == pytest.approx(np.hypot(*errors) / 2, rel=0.06)
    assert found["prompts_correct"] == (means > 0).mean()


# Whole folders.


def test_the_whole_benchmark_has_553_prompts_with_4_images() -> None:
    for protocol in PROTOCOLS.values():
        assert sum(protocol.prompts_by_tag.values()) == 553
        assert protocol.images_per_prompt == 4


def test_the_score_is_that_of_the_results_in_genevals_format(generated: Path, scored: dict[str, Any]) -> None:
    """As summary_scores.py of GenEval computes it, from the file that it reads."""
    lines = (generated / "scores" / f"{METRIC}.results.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) == 12
    by_tag, by_prompt = defaultdict(list), defaultdict(list)
    for result in results:
        assert list(result) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
        assert Path(result["filename"]).is_file()
        by_tag[result["tag"]].append(result["correct"])
        by_prompt[result["metadata"]].append(result["correct"])
    means = {tag: sum(correct) / 2 for tag, correct in by_tag.items()}
    overall = sum(means.values()) / 6
    assert 0 < overall < 1, "all right or all wrong would prove little"
    assert (scored["groups"], scored["value"]) == (means, pytest.approx(overall))
    assert scored["images_correct"] == sum(result["correct"] for result in results) / 12
    assert scored["prompts_correct"] == sum(map(any, by_prompt.values())) / 6
    assert json.loads(results[0]["metadata"]) == {"prompt": "prompt 0"} | PROMPTS[0]


def test_rows_have_boxes_and_reasons_for_the_report(generated: Path, scored: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (generated / "scores" / scored["rows"]).read_text().splitlines()]
    assert [(row["prompt"], row["image"]) for row in rows] == list(itertools.product(range(6), range(2)))
    for row in rows:
        assert row["correct"] == (row["reason"] == "")
        scores = [box[4] for boxes in row["details"].values() for box in boxes]
        assert all(score > (0.9 if PROMPTS[row["prompt"]]["tag"] == "counting" else 0.3) for score in scores)


def test_the_stored_score_says_how_it_was_made(generated: Path, weights: Path, scored: dict[str, Any]) -> None:
    assert json.loads((generated / "scores" / f"{METRIC}.json").read_text()) == scored
    assert (scored["metric"], scored["n"], scored["higher_is_better"]) == (METRIC, 12, True)
    digest = hashlib.sha256((weights / "mask2former.pth").read_bytes()).hexdigest()
    assert scored["weights"]["mask2former.pth"] == digest
    assert scored["settings"]["counting_score"] == 0.9
    assert scored["settings"]["self_test"]["golden_images"] == 1
    assert scored["settings"]["pictures"] == fingerprint(Generated(generated))


# What is not scored.


def refuse(folder: Path, weights: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_geneval(folder, weights, METRIC, ALONE, PROTOCOL)
    assert not (folder / "scores" / f"{METRIC}.json").exists()


def test_an_image_that_is_missing(unscored: Path, weights: Path) -> None:
    (unscored / "images" / "000000" / "000003-01.png").unlink()
    refuse(unscored, weights, "11 of 12")


def test_an_image_that_has_changed(unscored: Path, weights: Path) -> None:
    picture(1000).save(unscored / "images" / "000000" / "000003-01.png")
    refuse(unscored, weights, r"000003-01\.png has changed")


def test_prompts_that_are_not_the_whole_benchmark(unscored: Path, weights: Path) -> None:
    write_prompts(unscored, [*PROMPTS[:5], PROMPTS[0]])
    refuse(unscored, weights, r"is not GenEval: it has 6 prompts \(single_object 2, .*color_attr 0\), not 6")


def test_another_number_of_images(unscored: Path, weights: Path) -> None:
    (unscored / "manifest.json").write_text(json.dumps({"images_per_prompt": 1, "num_units": 6}))
    refuse(unscored, weights, "has 1 images a prompt; GenEval has 2")


def test_a_detector_that_finds_nothing(unscored: Path, weights: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(weights, tmp_path / "weights")
    checkpoint = torch.load(broken / "mask2former.pth")
    checkpoint["state_dict"]["panoptic_head.cls_embed.bias"][-1] += 9
    torch.save(checkpoint, broken / "mask2former.pth")
    refuse(unscored, broken, "the detector is broken")


def test_missing_weights_are_named_with_their_digest(unscored: Path, tmp_path: Path) -> None:
    protocol = dataclasses.replace(PROTOCOL, detectors=PROTOCOLS["geneval"].detectors)
    with pytest.raises(ValueError, match=r"weights .*743b7d99\.pth: no such file.* mmdetection 2"):
        score_geneval(unscored, tmp_path, "geneval", ALONE, protocol)


def test_a_part_of_the_benchmark_has_no_geneval_score(unscored: Path, weights: Path) -> None:
    with pytest.raises(ValueError, match="it has 6 prompts .* not 553"):
        score_geneval(unscored, weights, "geneval", ALONE)


# Ranks and killed runs.


def test_what_is_judged_is_not_judged_again(unscored: Path, weights: Path) -> None:
    score_geneval(unscored, weights, METRIC, ALONE, PROTOCOL)
    before, lines = files(unscored), num_lines(unscored)
    score_geneval(unscored, weights, METRIC, ALONE, PROTOCOL)
    assert (files(unscored), num_lines(unscored)) == (before, lines)


def test_half_a_line_does_not_spoil_the_next_one(generated: Path, tmp_path: Path) -> None:
    units = complete(generated)
    rows = Rows(tmp_path, "judge", units)
    whole = [{"prompt": unit.prompt, "image": unit.image, "sha256": unit.sha256} for unit in units[:2]]
    for row in whole:
        with rows.writer(ALONE) as append:
            append(row)
        with (tmp_path / "rank-0-of-1.jsonl").open("a") as file:
            file.write('{"prompt": 5, "ima')
    assert rows.read() == [row | {"judge": "judge"} for row in whole]
    assert rows.missing() == units[2:]


def test_other_weights_judge_anew(unscored: Path, weights: Path, tmp_path: Path) -> None:
    first = score_geneval(unscored, weights, METRIC, ALONE, PROTOCOL)
    others = shutil.copytree(weights, tmp_path / "weights", ignore=shutil.ignore_patterns("*-golden"))
    checkpoint = torch.load(others / "mask2former.pth")
    checkpoint["state_dict"]["panoptic_head.cls_embed.bias"][16] -= 9  # sees no dogs
    torch.save(checkpoint, others / "mask2former.pth")
    second = score_geneval(unscored, others, METRIC, ALONE, PROTOCOL)
    assert second["groups"]["single_object"] == 0 < first["groups"]["single_object"]
    assert second["settings"]["self_test"]["golden_images"] == 0


def test_golden_images_are_recorded_by_a_command_and_checked_by_every_score(
    unscored: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded with the right detector, they stop a score with one that finds nothing."""
    monkeypatch.setitem(PROTOCOLS, "geneval", PROTOCOL)
    site = shutil.copytree(weights, tmp_path / "weights", ignore=shutil.ignore_patterns("*-golden"))
    command = ["eval", "geneval-golden", "--weights", str(site)]
    assert isinstance(CliRunner().invoke(app, command).exception, ValueError)  # no folder of pictures
    golden = golden_folder(site, "geneval")
    golden.mkdir()
    picture(99).save(golden / "patches.png")
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0 and f"wrote {golden / 'golden.json'}" in said.output
    assert (golden / "golden.json").read_bytes() == (golden_folder(weights, METRIC) / "golden.json").read_bytes()
    score = ["eval", "score", "geneval", str(unscored), "--weights", str(site)]
    assert CliRunner().invoke(app, score).exit_code == 0
    checkpoint = torch.load(site / "mask2former.pth")
    checkpoint["state_dict"]["panoptic_head.cls_embed.bias"][-1] += 9  # "no object"
    torch.save(checkpoint, site / "mask2former.pth")
    broken = CliRunner().invoke(app, score).exception
    assert isinstance(broken, ValueError) and "the detector is broken: on the golden images" in str(broken)


@pytest.mark.parametrize(
    ("num_rows", "torn", "num_ranks"),
    [
        (4, True, 2),
        pytest.param(1, True, 1, marks=pytest.mark.slow),
        pytest.param(7, False, 1, marks=pytest.mark.slow),
        pytest.param(11, True, 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_files(
    run_ranks: Callable[..., list[Any]],
    generated: Path,
    scored: dict[str, Any],
    unscored: Path,
    weights: Path,
    num_rows: int,
    torn: bool,
    num_ranks: int,
) -> None:
    arguments = {
        "folder": unscored,
        "weights": weights,
        "metric": METRIC,
        "protocol": PROTOCOL,
        "short_side": SHORT_SIDE,
    }
    with pytest.raises(AssertionError, match=r"ranks \[0\] ended without a result"):
        run_ranks("geneval_score.py", 1, num_rows=num_rows, torn=torn, **arguments)
    assert num_lines(unscored) == num_rows + torn
    assert not (unscored / "scores" / f"{METRIC}.json").exists()
    results = run_ranks("geneval_score.py", num_ranks, **arguments)
    assert results == [scored] * num_ranks
    assert files(unscored) == files(generated)
    assert num_lines(unscored) == 12 + (torn and num_ranks > 1), "an image was judged twice, or never"
