"""Lists of prompts: what is read, what is counted, and what is no list."""

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from megadit.eval.geneval.judging import PROMPTS_BY_TAG
from megadit.eval.tasks.benchmarks import MJHQ_CATEGORIES, TaskOptions, load_task
from megadit.eval.tasks.task import Task, check_prompt


def geneval_lines() -> list[dict[str, object]]:
    """Records with GenEval's counts; the texts are ours."""
    return [
        {"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": f"a photo of a bench, {tag} {number}"}
        for tag, count in PROMPTS_BY_TAG.items()
        for number in range(count)
    ]


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def write_mjhq(path: Path, **changes: int) -> Path:
    counts = dict.fromkeys(MJHQ_CATEGORIES, 3000) | changes
    entries = {
        f"{category}{number:04d}": {"category": category, "prompt": f"{category}, number {number}"}
        for category, count in counts.items()
        for number in range(count)
    }
    path.write_text(json.dumps(entries))
    return path


def test_geneval(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "evaluation_metadata.jsonl", geneval_lines())
    task = load_task("geneval", TaskOptions(path))
    assert (task.id, len(task.records), task.images_per_prompt, task.num_units) == ("geneval", 553, 4, 2212)
    assert task.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert Counter(record["tag"] for record in task.records) == PROMPTS_BY_TAG
    assert task.prompts()[80] == {**geneval_lines()[80], "index": 80}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "is not GenEval's list: it has 552 prompts, not 553"),
        (lambda lines: [lines[1], *lines[1:]], r"lines 1 and 2 have the same prompt .*; GenEval's are unique"),
        (lambda lines: [{**lines[-1], "prompt": "one more"}, *lines[1:]], "single_object 79, .*color_attr 101, not 80"),
        (lambda lines: [{**lines[0], "tag": "colour"}, *lines[1:]], "line 1: not GenEval metadata: tag"),
    ],
)
def test_a_list_that_is_not_genevals(change: object, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metadata.jsonl", change(geneval_lines()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        load_task("geneval", TaskOptions(path))


def test_mjhq(tmp_path: Path) -> None:
    task = load_task("mjhq", TaskOptions(write_mjhq(tmp_path / "meta_data.json")))
    assert task.num_units == 30_000 and task.images_per_prompt == 1
    assert task.records[3001] == {"prompt": "art, number 1", "category": "art", "id": "art0001"}
    with pytest.raises(ValueError, match=r"is not MJHQ-30K's meta_data.json: animals 3000, art 2999"):
        load_task("mjhq", TaskOptions(write_mjhq(tmp_path / "fewer.json", art=2999)))
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="is not MJHQ-30K's meta_data.json"):
        load_task("mjhq", TaskOptions(tmp_path / "list.json"))


def test_coco_is_a_list_that_is_pinned(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"caption {number // 2}\n" for number in range(30_000)))  # captions do repeat there
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_task("coco30k", TaskOptions(path, prompts_sha256=digest)).num_units == 30_000
    with pytest.raises(ValueError, match=f"captions.txt: sha256 {digest}, not 00ff"):
        load_task("coco30k", TaskOptions(path, prompts_sha256="00ff"))
    path.write_text("only one\n")
    with pytest.raises(ValueError, match="has 1 prompts, not 30000"):
        load_task("coco30k", TaskOptions(path))


def test_a_list_of_captions_as_csv(tmp_path: Path) -> None:
    """As the lists of COCO come: quotes, commas and line ends inside of a caption; written by csv itself."""
    captions = ['A man, "on" a bench', "two\nlines", *(f"caption {number}" for number in range(29_998))]
    with (tmp_path / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["", "image_id", "text"])  # pandas writes its index under no name
        rows.writerows([number, 500 + number, caption] for number, caption in enumerate(captions))
    task = load_task("coco30k", TaskOptions(tmp_path / "captions.csv"))
    assert [record["prompt"] for record in task.records] == captions
    assert task.records[1] == {"prompt": "two\nlines", "image_id": "501"}


def test_imagenet_labels() -> None:
    balanced, uniform = (load_task("imagenet50k", TaskOptions(labels=labels)) for labels in ("balanced", "random"))
    for task in (balanced, uniform):
        assert task.num_units == 50_000 and {record["prompt"] for record in task.records} == {""}
    counts = [Counter(record["label"] for record in task.records) for task in (balanced, uniform)]
    assert set(counts[0].values()) == {50} and len(counts[0]) == 1000
    assert 20 < min(counts[1].values()) < 40 and 60 < max(counts[1].values()) < 90  # Poisson of mean 50
    assert [record["label"] for record in balanced.records[:3]] != [0, 1, 2]  # no class after the other
    assert load_task("imagenet50k", TaskOptions()).sha256 == balanced.sha256 != uniform.sha256
    assert balanced.settings["labels"] == "balanced"


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}")).filter(
            str.strip
        ),
        min_size=1,
        unique=True,
    )
)
@settings(max_examples=50, deadline=None)
def test_any_caption_is_read_as_it_is(tmp_path_factory: pytest.TempPathFactory, captions: list[str]) -> None:
    r"""Slashes, quotes, emoji, and the line ends that str.splitlines() knows beside "\n"."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "a.txt").write_bytes("".join(f"{caption}\n" for caption in captions).encode())
    text = load_task("prompts", TaskOptions(folder / "a.txt"))
    lines = load_task(
        "prompts", TaskOptions(write_lines(folder / "a.jsonl", [{"prompt": c, "key": 1} for c in captions]))
    )
    assert [record["prompt"] for record in text.records] == captions
    assert [record["prompt"] for record in lines.records] == captions
    assert lines.records[0]["key"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\n\nthree\n", r"a.txt line 2: no prompt in it, but ''"),
        ("a.txt", b"", r"a.txt line 1: no prompt in it"),
        ("a.txt", b"one\ntw\x00o\n", r"a.txt line 2: the prompt has the character U\+0000"),
        ("a.txt", b"one\nt\xe9l\xe9\n", r"a.txt line 2: not UTF-8"),
        ("a.txt", "one\ntw\N{REPLACEMENT CHARACTER}\n".encode(), r"a.txt line 2: the prompt has the character U\+FFFD"),
        ("a.txt", b"one\ntwo\none\n", r"lines 1 and 3 have the same prompt 'one'; .*--images-per-prompt"),
        ("a.jsonl", b'{"prompt": "one"}\n{"caption": "two"}\n', r"a.jsonl line 2: no prompt"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', r"a.jsonl line 1: the prompt has the character U\+D800"),
        ("a.jsonl", b'{"prompt": 3}\n', r"a.jsonl line 1: no prompt in it, but 3"),
        ("a.jsonl", b'["one"]\n', r"a.jsonl line 1: not a JSON object with a prompt but list"),
        ("a.jsonl", b"one\n", r"a.jsonl line 1: not JSON"),
        ("a.md", b"one\n", r"a.md: must be a file ending in .txt, .jsonl, .csv"),
        ("a.csv", b"image_id,alt\n1,a cat\n", r"no column prompt or caption or text in its first line, but .*'alt'"),
        ("a.csv", b"id,caption\n1,a cat\n2,a cat, asleep\n", r"line 3: more columns than in the first line"),
        ("a.csv", b"id,caption\n1,a cat\n2\n", r"line 3: no prompt"),
        ("a.csv", b'id,caption\n1,"a cat\n', r"not CSV: unexpected end of data"),
    ],
)
def test_lists_that_cannot_be(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task("prompts", TaskOptions(tmp_path / name))


def test_line_ends_and_byte_order_marks_of_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert [r["prompt"] for r in load_task("prompts", TaskOptions(tmp_path / "a.txt")).records] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("partiprompts", TaskOptions(), "no task 'partiprompts': there are geneval, mjhq"),
        ("geneval", TaskOptions(), "task geneval needs --prompts: evaluation_metadata.jsonl"),
        ("prompts", TaskOptions(Path("absent.txt")), "prompts absent.txt: no such file"),
        ("geneval", TaskOptions(images_per_prompt=2), "--images-per-prompt is for prompts"),
        ("prompts", TaskOptions(labels="random"), "--labels is for imagenet50k"),
        ("imagenet50k", TaskOptions(Path("a.txt")), "takes no --prompts"),
    ],
)
def test_options_of_other_tasks(name: str, options: TaskOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(name, options)


def test_an_index_in_a_list_is_not_ours() -> None:
    assert Task("prompts", 1, [{"prompt": "a", "index": 9}], 1, "").prompts() == [{"prompt": "a", "index": 0}]


def test_text_with_white_space_is_fine() -> None:
    check_prompt("two\tparts\r\nof a caption", "here")
