"""The folder of generated images: beginning, lists of finished units, completeness."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megadit import journal
from megadit.eval import units

MANIFEST = {"task": {"id": "prompts", "version": 1}, "num_units": 2, "images_per_prompt": 2, "versions": {"torch": "1"}}
PROMPTS = [{"index": 0, "prompt": "a caption with U+2028: \u2028"}]


def test_half_a_line_is_no_unit_and_spoils_none(tmp_path: Path) -> None:
    unit = {"prompt": 0, "image": 0, "sha256": "aa"}
    with journal.appending(tmp_path / units.JOURNAL, 0, 1) as append:
        append(journal.to_lines(unit))
    path = tmp_path / "units" / "rank-0-of-1.jsonl"
    path.write_text(path.read_text() + '{"prompt": 0, "image": 1, "sha')
    assert units.finished(tmp_path) == {(0, 0): "aa"}
    with journal.appending(tmp_path / units.JOURNAL, 0, 1) as append:
        append(journal.to_lines(unit | {"image": 1}, unit | {"image": 2}))
    assert units.finished(tmp_path) == {(0, 0): "aa", (0, 1): "aa", (0, 2): "aa"}


def test_beginning_again_is_nothing_new(tmp_path: Path) -> None:
    units.begin(tmp_path / "out", MANIFEST, PROMPTS)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    units.begin(tmp_path / "out", MANIFEST | {"versions": {"torch": "2"}}, PROMPTS)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert units.read_prompts(tmp_path / "out") == PROMPTS
    with pytest.raises(ValueError, match="images of another job \\(images_per_prompt: 2 there, 3 now\\)"):
        units.begin(tmp_path / "out", MANIFEST | {"images_per_prompt": 3}, PROMPTS)


@pytest.mark.parametrize(
    "left", [["prompts.jsonl"], [".partial-prompts.jsonl"], ["prompts.jsonl", ".partial-manifest.json"]]
)
def test_what_a_kill_left_at_the_beginning_is_in_nobodys_way(left: list[str], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).write_text("half")
    units.begin(tmp_path, MANIFEST, PROMPTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "prompts.jsonl"]
    assert units.read_prompts(tmp_path) == PROMPTS


def test_the_last_line_of_a_unit_counts_and_a_list_alone_does_not(generated: Callable[..., Path]) -> None:
    folder = generated(num_prompts=2)
    assert len(units.complete(folder)) == 4
    lists = folder / "units" / "rank-0-of-1.jsonl"
    lines = lists.read_text().splitlines(keepends=True)
    lists.write_text("".join(lines[:-1]))
    with pytest.raises(
        ValueError, match=r"incomplete: 3 of 4 images are there, the first that is missing is 000001-01"
    ):
        units.complete(folder)
    redone = json.loads(lines[0]) | {"sha256": "redone"}
    lists.write_text("".join(lines) + json.dumps(redone) + "\n")
    assert units.complete(folder)[0].sha256 == "redone"
