import gzip
import io
import json
import resource
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from megadit.data.format.manifest import Manifest, ManifestError
from megadit.data.format.members import DataSet
from megadit.data.indexing import captions
from megadit.data.indexing.captions import CaptionError, CaptionTable
from megadit.data.indexing.dataset import IndexingError, add_captions, index
from megadit.data.sa1b_like import make
from megadit.data.storage import MissingError, StorageError, open_store

Pairs = Sequence[tuple[str, str]]
KEYS = [f"sa_{number}" for number in range(1, 15)]
TEXTS = {key: f"caption of {key}, \u00fcber \u4e09" for key in KEYS}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set without captions over three tars; tests make a copy."""
    folder = tmp_path_factory.mktemp("indexed")
    make(str(folder / "tars"), 14, samples_per_tar=5, short_side=48, num_masks=2)
    index(str(folder / "tars"), str(folder / "set"))
    shutil.rmtree(folder / "tars")  # captions are joined without them
    return folder / "set"


@pytest.fixture
def copy(indexed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(indexed, tmp_path / "set"))


def write_jsonl(path: Path, pairs: Pairs) -> Path:
    path.write_text("".join(json.dumps({"key": key, "caption": text}) + "\n" for key, text in pairs))
    return path


def write_tar(path: Path, pairs: Pairs) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix != ".tar" else "w") as tar:
        for key, text in pairs:
            info = tarfile.TarInfo(f"SA1B_caption/{key}.txt")
            data = f"{text}\n".encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, pairs: Pairs) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow (requirements/tools.txt)")
    parquet = pytest.importorskip("pyarrow.parquet")
    keys, texts = zip(*pairs, strict=True)
    parquet.write_table(pyarrow.table({"url": keys, "key": keys, "caption": texts}), path)
    return path


def stored(url: Path) -> dict[str, str | None]:
    members = DataSet(str(url))
    return {key.decode(): members.caption(sample) for sample, key in enumerate(members.index.keys.tolist())}


@pytest.mark.parametrize("name", ["t.tar.gz", "t.tgz", "t.tar", "t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_tables_of_every_form(name: str, copy: Path, tmp_path: Path) -> None:
    pairs = [(key, TEXTS[key]) for key in sorted(KEYS, reverse=True)] + [("sa_99", "of no sample")]
    if ".tar" in name or name == "t.tgz":
        table = write_tar(tmp_path / name, pairs)
    elif name == "t.parquet":
        table = write_parquet(tmp_path / name, pairs)
    else:
        table = write_jsonl(tmp_path / "t.jsonl", pairs)
        if name.endswith(".gz"):
            table = tmp_path / name
            table.write_bytes(gzip.compress((tmp_path / "t.jsonl").read_bytes()))
    joined = add_captions(str(copy), CaptionTable(str(table)))
    assert joined.unknown_captions == 1
    assert joined.manifest.members == ("jpg", "json", "txt")
    assert joined.manifest.left_out == {}
    assert stored(copy) == TEXTS
    for shard in joined.manifest.shards:  # plain texts, neighbours beside each other
        assert shard.captions == f"captions/{shard.name}.txt"
    assert (copy / "captions" / "sa_000001.tar.txt").read_text() == "".join(TEXTS[key] for key in KEYS[5:10])


def test_indexing_and_joining_later_are_the_same(copy: Path, tmp_path: Path) -> None:
    table = CaptionTable(str(write_jsonl(tmp_path / "t.jsonl", list(TEXTS.items()))))
    make(str(tmp_path / "tars"), 14, samples_per_tar=5, short_side=48, num_masks=2)
    index(str(tmp_path / "tars"), str(tmp_path / "at once"), captions=table)
    add_captions(str(copy), table)
    for name in ("index/key.npy", "index/place.txt.npy", "index/place.jpg.npy", "captions/sa_000002.tar.txt"):
        assert (copy / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()


@settings(deadline=None, max_examples=25)
@given(
    chosen=st.lists(st.sampled_from(KEYS), unique=True, min_size=1),
    empty=st.sets(st.sampled_from(KEYS)),
    num_spools=st.integers(1, 4),
)
def test_samples_without_a_caption_are_left_out(
    indexed: Path, tmp_path_factory: pytest.TempPathFactory, chosen: list[str], empty: set[str], num_spools: int
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    url = shutil.copytree(indexed, folder / "set")
    pairs = [(key, " \n" if key in empty else f" {TEXTS[key]}\n") for key in chosen]
    kept = {key: TEXTS[key] for key in KEYS if key in chosen and key not in empty}
    table = CaptionTable(str(write_jsonl(folder / "t.jsonl", pairs)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "NUM_SPOOLS", num_spools)
        patch.setattr(captions, "BATCH", 3)
        if not kept:
            with pytest.raises(CaptionError, match="none of its 0 keys"):
                add_captions(str(url), table)
            return
        manifest = add_captions(str(url), table).manifest
    assert stored(url) == kept
    assert manifest.num_samples == len(kept)
    missing, blank = len(set(KEYS) - set(chosen)), len(empty & set(chosen))
    assert manifest.left_out == {
        reason: count for reason, count in (("no caption", missing), ("empty caption", blank)) if count
    }
    assert [shard.num_samples for shard in manifest.shards] == [
        count for count in (sum(key in kept for key in part) for part in (KEYS[:5], KEYS[5:10], KEYS[10:])) if count
    ]


def test_another_table_replaces_the_captions(copy: Path, tmp_path: Path) -> None:
    add_captions(str(copy), CaptionTable(str(write_jsonl(tmp_path / "few.jsonl", [("sa_7", "one")]))))
    assert stored(copy) == {"sa_7": "one"}
    add_captions(str(copy), CaptionTable(str(write_jsonl(tmp_path / "all.jsonl", list(TEXTS.items())))))
    assert stored(copy) == TEXTS


def test_keys_by_other_names(copy: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    lines = [{"image": f"sa_000000/{key}.jpg", "text": text, "alt": text.upper()} for key, text in TEXTS.items()]
    table.write_text("\n\n".join(map(json.dumps, lines)))
    add_captions(str(copy), CaptionTable(str(table)))
    assert stored(copy) == TEXTS
    add_captions(str(copy), CaptionTable(str(table), key_field="image", caption_field="alt"))
    assert stored(copy)["sa_3"] == TEXTS["sa_3"].upper()
    with pytest.raises(CaptionError, match=r"line 1: there is no field title; it has image, text, alt \(--caption-f"):
        add_captions(str(copy), CaptionTable(str(table), caption_field="title"))


BAD_LINES = {
    "twice": ('{"key": "sa_1", "caption": "a"}', r"the key 'sa_1' occurs twice, in line 1 and 15"),
    "not json": ("sa_1,a", "line 15: not JSON"),
    "not utf-8": (b'{"key": "sa_1", "caption": "\xff"}', "line 15: not JSON, or not UTF-8"),
    "no object": ("[1]", "line 15: a line is an object"),
    "no text": ('{"key": "sa_1", "caption": 3}', "line 15: 3 is not a caption"),
    "no key": ('{"key": null, "caption": "a"}', "line 15: None is not a key"),
    "surrogate": (r'{"key": "sa_1", "caption": "\ud800"}', "line 15: the caption is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_lines_that_are_wrong(name: str, copy: Path, tmp_path: Path) -> None:
    line, message = BAD_LINES[name]
    table = write_jsonl(tmp_path / "t.jsonl", list(TEXTS.items()))
    with table.open("ab") as file:
        file.write(line if isinstance(line, bytes) else line.encode())
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(CaptionError, match=f"t.jsonl.* ?{message}"):
        add_captions(str(copy), CaptionTable(str(table)))
    assert (copy / "manifest.json").read_bytes() == before
    assert not (copy / "captions").exists()


def test_tables_that_are_wrong(copy: Path, tmp_path: Path) -> None:
    def join(path: Path) -> None:
        add_captions(str(copy), CaptionTable(str(path)))

    with pytest.raises(MissingError, match=r"none.jsonl does not exist"):
        join(tmp_path / "none.jsonl")
    (tmp_path / "t.csv").touch()
    with pytest.raises(CaptionError, match=r"t.csv: a table of captions is .tar, .tar.gz"):
        join(tmp_path / "t.csv")
    with pytest.raises(CaptionError, match=r"none of its 2 keys is that of a sample; a sample is called 'sa_1'"):
        join(write_jsonl(tmp_path / "other.jsonl", [("coco_1", "a"), ("coco_2", "b")]))
    with pytest.raises(CaptionError, match=r"twice.tgz: the key 'sa_1' occurs twice, in file 1 and 3"):
        join(write_tar(tmp_path / "twice.tgz", [("sa_1", "a"), ("sa_2", "b"), ("sa_1", "c")]))
    table = write_tar(tmp_path / "t.tar.gz", list(TEXTS.items()))
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(CaptionError, match=r"t.tar.gz is cut short or damaged"):
        join(table)
    table = write_tar(tmp_path / "t.tar", list(TEXTS.items()))
    table.write_bytes(table.read_bytes()[: 6 * 1024])
    with pytest.raises(CaptionError, match=r"t.tar is cut short"):
        join(table)
    assert Manifest.load(str(copy)).members == ("jpg", "json")


def test_without_pyarrow(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").touch()
    with pytest.raises(CaptionError, match=r"t.parquet: a .parquet table needs pyarrow"):
        add_captions(str(copy), CaptionTable(str(tmp_path / "t.parquet")))


def test_a_full_disk(copy: Path, tmp_path: Path) -> None:
    table = CaptionTable(str(write_jsonl(tmp_path / "t.jsonl", [(key, 2000 * "x") for key in KEYS])))
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), (copy / "manifest.json").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(StorageError, match=r"cannot keep captions in /.*: File too large; set TMPDIR"):
            add_captions(str(copy), table)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (copy / "manifest.json").read_bytes() == before
    assert add_captions(str(copy), table).manifest.num_samples == 14


def test_a_join_that_broke_is_not_taken_for_whole(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = CaptionTable(str(write_jsonl(tmp_path / "few.jsonl", [("sa_7", "one")])))
    add_captions(str(copy), few)
    everything = CaptionTable(str(write_jsonl(tmp_path / "all.jsonl", list(TEXTS.items()))))
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "dump", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add_captions(str(copy), everything)
    with pytest.raises(StorageError, match="does not belong to the manifest beside it"):
        DataSet(str(copy))
    add_captions(str(copy), few)  # also where the manifest still is that of this table
    assert stored(copy) == {"sa_7": "one"}
    add_captions(str(copy), everything)
    assert stored(copy) == TEXTS


def test_sets_that_have_no_place_for_captions(packed: Path, tmp_path: Path) -> None:
    table = CaptionTable(str(write_jsonl(tmp_path / "t.jsonl", list(TEXTS.items()))))
    with pytest.raises(IndexingError, match="was not made by `megadit data index`"):
        add_captions(str(packed / "train"), table)
    with pytest.raises(ManifestError, match="no data set"):
        add_captions(str(tmp_path), table)


def test_captions_and_tables_in_s3(indexed: Path, tmp_path: Path, s3_bucket: str, monkeypatch) -> None:
    monkeypatch.setenv("MEGADIT_CACHE", str(tmp_path / "cache"))
    store = open_store(f"{s3_bucket}/set")
    for path in indexed.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(indexed).as_posix(), path.read_bytes())
    store.put("t.tar.gz", write_tar(tmp_path / "t.tar.gz", list(TEXTS.items())).read_bytes())
    add_captions(store.url(), CaptionTable(store.url("t.tar.gz")))
    members = DataSet(store.url())
    assert [members.caption(sample) for sample in range(14)] == list(TEXTS.values())
