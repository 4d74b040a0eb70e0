import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megadit.cli.data import data_app
from megadit.data.format.members import DataSet
from megadit.data.indexing.captions import CaptionTable
from megadit.data.indexing.dataset import index
from megadit.data.inspect import Quantiles, format_stats, stats, verify
from megadit.data.sa1b_like import make
from megadit.data.storage import StorageError, open_store


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """An indexed data set with captions, set/, over tars/."""
    make(str(tmp_path / "tars"), 40, samples_per_tar=20, short_side=32, num_masks=2)
    table = CaptionTable(str(tmp_path / "tars" / "captions.jsonl"))
    index(str(tmp_path / "tars"), str(tmp_path / "set"), captions=table)
    return tmp_path


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed / "train", tmp_path / "copy"))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_stats_of_an_indexed_data_set(raw: Path) -> None:
    found = stats(str(raw / "set"))
    captions = [json.loads(line)["caption"] for line in (raw / "tars" / "captions.jsonl").read_text().splitlines()]
    lengths = sorted(map(len, captions))
    assert found.characters == Quantiles(lengths[0], lengths[20], lengths[-1], lengths[-1])
    assert found.short_sides == Quantiles(32, 32, 32, 32)
    assert found.member_bytes["txt"] == sum(lengths)
    assert found.member_bytes["jpg"] > 40 * 500
    assert sum(found.aspect_ratios.values()) == 40
    assert {"0.50", "1.00", "2.00"} <= set(found.aspect_ratios)
    assert not found.buckets and not found.labels and found.tokens is None
    text = format_stats(found)
    assert "set: 40 samples in 2 shards" not in text
    assert text.startswith("tars: 40 samples in 2 shards, ")
    assert f"shards at {(raw / 'tars').as_uri()}" in text
    assert f"least {lengths[0]}, median {lengths[20]}" in text


def test_stats_of_a_packed_data_set(packed: Path) -> None:
    url = str(packed / "train")
    found, members = stats(url), DataSet(url)
    assert found.buckets == {"16x16": found.manifest.num_samples}
    tokens = [len(np.load(io.BytesIO(members.get("text.npy", n)))) for n in range(found.manifest.num_samples)]
    assert found.tokens is not None
    assert (found.tokens.least, found.tokens.most) == (min(tokens), max(tokens))
    assert found.characters is not None
    assert "16x16" in format_stats(found)


def test_stats_count_classes_and_what_was_left_out(pack_animals, raw: Path, tmp_path: Path) -> None:
    pack_animals(str(tmp_path / "labelled"), label="subgroup")
    found = stats(str(tmp_path / "labelled" / "train"))
    assert tuple(found.labels) == found.manifest.labels
    assert sum(found.labels.values()) == found.manifest.num_samples
    few = raw / "few.jsonl"
    few.write_text('{"key": "sa_3", "caption": "three"}\n')
    index(str(raw / "tars"), str(raw / "set"), captions=CaptionTable(str(few)))
    assert "left out: 39 (no caption)" in format_stats(stats(str(raw / "set")))


def test_sound_data_sets(raw: Path, packed: Path) -> None:
    assert verify(str(raw / "set")) == verify(str(packed / "train")) == []


@pytest.mark.parametrize("kind", ["png", "json", "text.npy", "pooled.npy"])
def test_a_flipped_bit_of_any_member_is_found(kind: str, copy: Path) -> None:
    members = DataSet(str(copy))
    sample = members.manifest.shards[0].num_samples + 3
    offset, size, _ = members.index.places[kind][sample].item()
    flip(copy / "shard-000001.tar", offset + size - 1)
    key = members.index.keys[sample].decode()
    problems = verify(str(copy))
    assert len(problems) == 2
    assert (
        problems[0] == f"{(copy / 'shard-000001.tar').as_uri()}: member {key}.{kind}: CRC-32 differs, at byte {offset}"
    )
    assert problems[1].endswith("shard-000001.tar: sha256 differs")
    with pytest.raises(StorageError, match="CRC-32 differs"):
        members.get(kind, sample)


def test_what_else_is_wrong_with_shards(copy: Path) -> None:
    whole = (copy / "shard-000000.tar").read_bytes()
    flip(copy / "shard-000000.tar", 300)  # of a header, in no member
    assert verify(str(copy)) == [f"{(copy / 'shard-000000.tar').as_uri()}: sha256 differs"]
    (copy / "shard-000000.tar").write_bytes(whole[:20000])
    problems = verify(str(copy))
    assert sum("CRC-32 differs" in problem for problem in problems) == 6  # five are named
    assert any(f"has 20000 bytes, the manifest says {len(whole)}" in problem for problem in problems)
    (copy / "shard-000000.tar").unlink()
    assert verify(str(copy)) == [f"{(copy / 'shard-000000.tar').as_uri()} does not exist"]


def test_captions_that_changed(raw: Path) -> None:
    flip(raw / "set" / "captions" / "sa_000001.tar.txt", 10)
    assert len(problems := verify(str(raw / "set"))) == 1
    assert "sa_000001.tar.txt: member sa_21.txt: CRC-32 differs, at byte " in problems[0]


def test_a_tar_that_is_newer_than_its_index(raw: Path) -> None:
    tar = raw / "tars" / "sa_000001.tar"
    tar.write_bytes(tar.read_bytes())
    message = "is newer than the index: its ETag is another one; run `megadit data index` again"
    assert verify(str(raw / "set")) == [f"{tar.as_uri()} {message}"]
    index(str(raw / "tars"), str(raw / "set"))
    assert verify(str(raw / "set")) == []


def test_a_share_of_the_samples(raw: Path) -> None:
    members, tar = DataSet(str(raw / "set")), raw / "tars" / "sa_000000.tar"
    chosen = {share: {member.row for member in members.members_of(members.files[0], share)} for share in (0.5, 1.0)}
    assert chosen == {0.5: {16, 17, 18, 19}, 1.0: set(range(20))}  # whole blocks of 16 neighbours
    time = tar.stat().st_mtime_ns
    offset = members.index.places["jpg"]["offset"][0]
    flip(tar, offset + 30)
    os.utime(tar, ns=(time, time))  # its ETag stays: the file has rotted
    assert verify(str(raw / "set"), sample_share=0.5) == []
    assert verify(str(raw / "set")) == [f"{tar.as_uri()}: member sa_1.jpg: CRC-32 differs, at byte {offset}"]
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            verify(str(raw / "set"), sample_share=share)


def test_a_data_set_in_s3(raw: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGADIT_CACHE", str(tmp_path / "cache"))
    store = open_store(f"{s3_bucket}/tars")
    for path in (raw / "tars").iterdir():
        store.put(path.name, path.read_bytes())
    url = f"{s3_bucket}/set"
    index(store.url(), url, match="*.tar", captions=CaptionTable(store.url("captions.jsonl")))
    assert verify(url) == []
    assert stats(url).characters == stats(str(raw / "set")).characters
    store.put("sa_000000.tar", (raw / "tars" / "sa_000001.tar").read_bytes())
    (problem,) = verify(url)
    assert problem.startswith(f"{store.url('sa_000000.tar')} is newer than the index")


def test_the_commands(raw: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(data_app, arguments)
        return result.exit_code, result.stdout if result.exception is None else str(result.exception)

    tars, url, table = str(raw / "tars"), str(tmp_path / "new"), str(raw / "tars" / "captions.jsonl")
    checklist = str(raw / "tars" / "checklist.chk")
    code, text = run("index", f"{tars}/sa_*.tar", url, "--checklist", checklist, "--workers", "2")
    assert (code, text) == (0, f"read 2 tars\n{url}: 40 samples in 2 tars, without captions\n")
    (raw / "few.jsonl").write_text('{"key": "sa_3", "caption": "a"}\n{"key": "x", "caption": "b"}\n')
    code, text = run("caption", url, str(raw / "few.jsonl"))
    assert text.splitlines()[1:] == [
        "left out: 39 samples (no caption)",
        "not used: 1 captions (no sample has their key)",
    ]
    assert run("caption", url, table) == (0, f"{url}: 40 samples in 2 tars, with captions\n")
    assert run("stats", url)[1].startswith("tars: 40 samples in 2 shards")
    assert run("verify", url) == (0, f"{url} is sound\n")
    assert run("preview", url, str(tmp_path / "a.png"), "--num", "5") == (0, f"wrote 5 pictures to {tmp_path}/a.png\n")
    flip(raw / "tars" / "sa_000000.tar", 1000)
    assert run("verify", url) == (1, f"{url}: something is wrong (above)")
