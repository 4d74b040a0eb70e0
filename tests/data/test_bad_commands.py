"""Bad input to `megadit data`: one line and exit code 1 for each, and nothing is left that passes for whole.

What each message says in detail is tested beside the code; this goes through the commands, as a user meets them.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megadit import cli
from megadit.data import sa1b_like

PICTURES = ["emoji", "--no-text", "--size", "32", "--where", "subgroup=animal-bird", "--holdout", "4"]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def megadit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in a new folder: its exit code, and what it says on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["megadit", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def assert_one_line(outcome: tuple[int, str], message: str) -> None:
    code, text = outcome
    assert code == 1
    assert text.startswith("megadit: error: ")
    assert text.count("\n") == 1 and text.endswith("\n")
    assert message in text


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    sa1b_like.make(str(tmp_path / "tars"), 12, samples_per_tar=4, short_side=48, num_masks=2)
    return tmp_path / "tars"


def write_captions(path: Path, keys: list[str]) -> str:
    path.write_text("".join(json.dumps({"key": key, "caption": f"of {key}"}) + "\n" for key in keys))
    return str(path)


COMMANDS = {
    "index from": ["index", "{url}/sa_*.tar", "set"],
    "index to": ["index", "tars", "{url}/set"],
    "caption": ["caption", "{url}", "tars/captions.jsonl"],
    "pack from": ["pack", "{url}", "packed", "--no-text"],
    "pack to": ["pack", *PICTURES[:1], "{url}/packed", *PICTURES[1:]],
    "stats": ["stats", "{url}"],
    "verify": ["verify", "{url}"],
    "preview": ["preview", "{url}", "sheet.png"],
}


def test_a_bucket_that_is_missing(s3_bucket: str, tars: Path, megadit: Run) -> None:
    for command in COMMANDS.values():
        outcome = megadit("data", *(word.format(url="s3://no-such-bucket/x") for word in command))
        assert_one_line(outcome, "the bucket 'no-such-bucket' does not exist at http://127.0.0.1")
    assert [path.name for path in Path.cwd().iterdir()] == ["tars"]


def test_keys_that_have_no_permission(
    s3_bucket: str, tars: Path, megadit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for command in COMMANDS.values():
        outcome = megadit("data", *(word.format(url=f"{s3_bucket}/x") for word in command))
        assert_one_line(outcome, "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    assert [path.name for path in Path.cwd().iterdir()] == ["tars"]


@pytest.mark.parametrize("where", ["s3", "file"])
def test_a_prefix_that_is_empty_or_missing(where: str, s3_bucket: str, tars: Path, megadit: Run) -> None:
    url = f"{s3_bucket}/nothing" if where == "s3" else "nothing"
    said = {"index from": "nothing there is called 'sa_*.tar'; it may be empty, or not exist"}
    missing = "no source" if where == "file" else "no data set"
    for name in ("index from", "caption", "stats", "verify", "preview", "pack from"):
        outcome = megadit("data", *(word.format(url=url) for word in COMMANDS[name]))
        assert_one_line(outcome, said.get(name, missing if name == "pack from" else "no data set at"))
    assert [path.name for path in Path.cwd().iterdir()] == ["tars"]


def test_a_tar_that_is_cut_short(tars: Path, megadit: Run) -> None:
    path = tars / "sa_000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert_one_line(megadit("data", "index", "tars", "set"), "sa_000001.tar is cut short: ")
    assert_one_line(megadit("data", "stats", "set"), "no data set at set")
    path.write_bytes(whole)
    assert megadit("data", "index", "tars", "set") == (0, "")


def test_captions_with_duplicate_or_unknown_keys(tars: Path, megadit: Run, tmp_path: Path) -> None:
    assert megadit("data", "index", "tars", "set") == (0, "")
    before = Path("set/manifest.json").read_bytes()
    twice = write_captions(tmp_path / "twice.jsonl", ["sa_1", "sa_2", "sa_1"])
    assert_one_line(megadit("data", "caption", "set", twice), "the key 'sa_1' occurs twice, in line 1 and 3")
    unknown = write_captions(tmp_path / "unknown.jsonl", ["coco_1", "coco_2"])
    assert_one_line(megadit("data", "caption", "set", unknown), "none of its 2 keys is that of a sample")
    assert Path("set/manifest.json").read_bytes() == before
    # Half of the samples, and keys that nobody has: counted, not hidden.
    some = write_captions(tmp_path / "some.jsonl", [f"sa_{number}" for number in range(1, 7)] + ["coco_1"])
    assert megadit("data", "caption", "set", some) == (0, "")
    assert json.loads(Path("set/manifest.json").read_text())["left_out"] == {"no caption": 6}


def test_an_index_that_is_older_than_its_tar(tars: Path, megadit: Run) -> None:
    assert megadit("data", "index", "tars", "set") == (0, "")
    os.utime(tars / "sa_000001.tar", ns=(1, 1))
    pack = ["data", "pack", "set", "packed", "--no-text", "--size", "16", "--holdout", "0"]
    assert_one_line(megadit(*pack), "sa_000001.tar was changed since it was indexed")
    assert_one_line(megadit("data", "stats", "packed/train"), "no data set at packed/train")
    assert_one_line(megadit("data", "verify", "set"), "set: something is wrong (above)")
    assert_one_line(megadit("data", "preview", "set", "sheet.png"), "sa_000001.tar was changed since it was indexed")
    assert not Path("sheet.png").exists()
    assert megadit("data", "index", "tars", "set") == (0, "")
    assert megadit(*pack)[0] == 0


def test_a_disk_that_is_full(megadit: Run) -> None:
    pack = ["data", "pack", PICTURES[0], "packed", *PICTURES[1:], "--shard-samples", "5"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        assert_one_line(megadit(*pack), "cannot write file://")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = [path for path in Path("packed").rglob("*") if path.is_file()]
    assert left == [Path("packed/pack.json")]
    assert_one_line(megadit("data", "stats", "packed/train"), "no data set at packed/train")
    assert megadit(*pack)[0] == 0
    assert megadit("data", "verify", "packed/train") == (0, "")
