import gzip
import hashlib
import io
import json
import resource
import shutil
import tarfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, reject, settings, strategies as st
from PIL import Image

from megadit.data.format.manifest import Manifest
from megadit.data.format.members import DataSet
from megadit.data.indexing.dataset import Indexed, IndexingError, index
from megadit.data.indexing.tars import TarError, scan
from megadit.data.sa1b_like import make
from megadit.data.storage import FileStore, MissingError, StorageError, object_file, open_store
from megadit.data.storage.object_file import ObjectFile

NUM_SAMPLES, PER_TAR = 14, 5


def picture(width: int, height: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 0)).save(buffer, format=kind)
    return buffer.getvalue()


PICTURES = [((h, w), picture(w, h, kind)) for kind in ("JPEG", "PNG", "WEBP") for h, w in ((3, 5), (40, 20))]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of SA-1B's shape; tests that change them make a copy."""
    folder = tmp_path_factory.mktemp("tars")
    make(str(folder), NUM_SAMPLES, samples_per_tar=PER_TAR, short_side=48, num_masks=2)
    return folder


@pytest.fixture
def copy(tars: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tars, tmp_path / "tars"))


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def without_parts(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if not name.startswith("parts/")}


@st.composite
def tar_members(draw: st.DrawFn) -> list[tuple[str, bytes]]:
    """Members of several samples, in any order, in folders of any depth, with others between them."""
    folders = st.sampled_from(["", "./", "a/b/", "./x.y/", f"{'long' * 30}/{'er' * 60}/", "\u00fc/"])
    keys = draw(st.lists(st.text("abz019_-", min_size=1, max_size=130), min_size=1, max_size=6, unique=True))
    members = []
    for key in keys:
        for kind in draw(st.lists(st.sampled_from(["jpg", "json", "cls", "seg.png"]), unique=True, max_size=4)):
            data = draw(st.sampled_from(PICTURES))[1] if kind == "jpg" else draw(st.binary(max_size=1500))
            members.append((f"{draw(folders)}{key}.{kind}", data))
    members += [(f"{draw(folders)}{name}", b"other") for name in draw(st.sets(st.sampled_from(["README", ".hidden"])))]
    return draw(st.permutations(members))


@settings(deadline=None, max_examples=60)
@given(members=tar_members(), kind=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_places_are_the_bytes_that_tarfile_reads(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]], kind: int
) -> None:
    try:
        path = write_tar(tmp_path_factory.mktemp("tar") / "x.tar", members, kind)
    except ValueError:
        reject()  # a name too long for ustar
    with tarfile.open(path) as tar:
        expected: dict[str, dict[str, bytes]] = {}
        for info in tar.getmembers():
            key, _, suffix = Path(info.name).name.partition(".")
            if key and suffix in ("jpg", "json"):
                expected.setdefault(key, {})[suffix] = tar.extractfile(info).read()
    whole = {key: sample for key, sample in expected.items() if len(sample) == 2}
    with mock.patch.object(object_file, "WINDOW_BYTES", 1000):  # members straddle windows
        content = scan(ObjectFile(FileStore(path.parent), path.name), ("jpg", "json"))
    data = path.read_bytes()
    found = {}
    for row, key in enumerate(content.keys.tolist()):
        found[key.decode()] = {}
        for suffix, places in content.places.items():
            offset, size, crc32 = places[row].item()
            found[key.decode()][suffix] = data[offset : offset + size]
            assert crc32 == zlib.crc32(data[offset : offset + size])
        stated = dict(map(reversed, PICTURES))[found[key.decode()]["jpg"]]
        assert tuple(content.sizes[row]) == stated
    assert found == whole
    assert (np.diff(content.places["jpg"]["offset"]) > 0).all()
    assert sum(content.left_out.values()) == len(expected) - len(whole)
    assert sum(content.others.values()) == len(members) - sum(map(len, expected.values()))


@pytest.mark.parametrize("where", ["file", "s3"])
def test_a_data_set_over_tars_that_stay_where_they_are(
    where: str, tars: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGADIT_CACHE", str(tmp_path / "cache"))
    source, destination = str(tars), str(tmp_path / "set")
    if where == "s3":
        bucket = request.getfixturevalue("s3_bucket")
        source, destination = f"{bucket}/sa-1b", f"{bucket}/set"
        for path in tars.iterdir():
            open_store(source).put(path.name, path.read_bytes())
    indexed = index(source, destination, match="sa_*.tar")
    manifest = Manifest.load(destination)
    assert indexed == Indexed(manifest, num_read=3)
    assert manifest.root == open_store(source).url()
    assert manifest.num_samples == NUM_SAMPLES
    assert manifest.members == ("jpg", "json")
    assert [shard.num_samples for shard in manifest.shards] == [5, 5, 4]
    assert [shard.etag for shard in manifest.shards] == [
        open_store(source).etag(shard.name) for shard in manifest.shards
    ]
    assert {shard.bucket for shard in manifest.shards} == {None}
    members = DataSet(destination)
    for sample in range(NUM_SAMPLES):
        assert members.index.keys[sample] == f"sa_{sample + 1}".encode()
        record = json.loads(members.get("json", sample))["image"]
        with Image.open(io.BytesIO(members.get("jpg", sample))) as stored:
            assert stored.size == (record["width"], record["height"])
            assert members.index.sizes[sample].tolist() == [record["height"], record["width"]]


def test_an_index_is_small(tars: Path, tmp_path: Path) -> None:
    manifest = index(str(tars), str(tmp_path)).manifest
    columns = manifest.load_index(open_store(str(tmp_path))).columns().values()
    assert sum(column.nbytes for column in columns) <= 64 * NUM_SAMPLES * len(manifest.members)
    assert sum(column.nbytes for column in columns) == NUM_SAMPLES * (5 + 2 * 16 + 4)  # "sa_14", places, size


def test_a_pattern_may_end_the_address(tars: Path, tmp_path: Path) -> None:
    manifest = index(f"{tars}/sa_00000[12].tar", str(tmp_path)).manifest
    assert [shard.name for shard in manifest.shards] == ["sa_000001.tar", "sa_000002.tar"]
    assert manifest.root == tars.as_uri()


def test_workers_and_breaks_change_nothing(tars: Path, tmp_path: Path) -> None:
    index(str(tars), str(tmp_path / "whole"), workers=1)
    index(str(tars), str(tmp_path / "threads"), workers=8)
    assert without_parts(tmp_path / "threads") == without_parts(tmp_path / "whole")

    def break_off(done: int, total: int) -> None:
        if (tmp_path / "broken" / "parts" / "sa_000001.tar.npz").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(str(tars), str(tmp_path / "broken"), workers=1, bars=lambda _: nullcontext(break_off))
    assert set(files(tmp_path / "broken")) == {"parts/sa_000000.tar.npz", "parts/sa_000001.tar.npz"}
    with pytest.raises(ValueError, match="no data set"):
        Manifest.load(str(tmp_path / "broken"))
    assert index(str(tars), str(tmp_path / "broken")).num_read == 1
    assert without_parts(tmp_path / "broken") == without_parts(tmp_path / "whole")
    assert index(str(tars), str(tmp_path / "broken")).num_read == 0


def test_a_tar_that_changed_is_read_again(copy: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    before = index(str(copy), url).manifest
    write_tar(copy / "sa_000001.tar", [("sa_99.json", b"{}"), ("sa_99.jpg", PICTURES[0][1])])
    indexed = index(str(copy), url)
    assert indexed.num_read == 1
    assert [shard.num_samples for shard in indexed.manifest.shards] == [5, 1, 4]
    assert indexed.manifest.fingerprint != before.fingerprint
    assert DataSet(url).get("jpg", 5) == PICTURES[0][1]


def test_a_full_disk(tars: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(StorageError, match=r"cannot write .*parts/sa_00000\d.tar.npz: File too large"):
            index(str(tars), str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not files(tmp_path)
    assert index(str(tars), str(tmp_path)).num_read == 3


def test_what_is_not_a_whole_sample_is_counted(tmp_path: Path) -> None:
    jpg = PICTURES[1][1]
    members = [("a.jpg", jpg), ("a.json", b"{}"), ("b.jpg", jpg), ("c.json", b"{}"), ("d.JPG", jpg), ("d.json", b"1")]
    members += [("e.jpg", b"not a picture"), ("e.json", b"{}"), ("notes.txt", b"x"), ("LICENSE", b"x")]
    write_tar(tmp_path / "x.tar", members)
    write_tar(tmp_path / "y.tar", [("z.json", b"{}")])
    indexed = index(str(tmp_path), str(tmp_path / "set"))
    assert indexed.manifest.left_out == {"no json": 1, "no jpg": 2, "unreadable picture": 1}
    assert indexed.others == {"txt": 1, "": 1}
    assert [shard.name for shard in indexed.manifest.shards] == ["x.tar"]  # no shard is empty
    assert DataSet(str(tmp_path / "set")).index.keys.tolist() == [b"a", b"d"]
    alone = index(str(tmp_path), str(tmp_path / "alone"), members=["jpg"]).manifest
    assert (alone.num_samples, alone.members) == (3, ("jpg",))
    with pytest.raises(
        IndexingError, match=r"no sample has png \(--members\); other members there: .*4 \.jpg, 5 \.json"
    ):
        index(str(tmp_path), str(tmp_path / "none"), members=["png"])


@pytest.mark.parametrize("members", [["json"], ["jpg", "png"], ["jpg", "cls"], ["jpg", "jpg"]])
def test_members_that_are_no_sample(members: list[str], tars: Path, tmp_path: Path) -> None:
    with pytest.raises(IndexingError, match="a sample has one picture"):
        index(str(tars), str(tmp_path), members=members)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "in a picture": (lambda p: cut(p, 1000), r"is cut short: it ends at byte 1000, and './sa_6.jpg' at byte \d+"),
    "in a header": (lambda p: cut(p, header_of(p, 3) + 100), r"is cut short: it ends at byte \d+, without the mark"),
    "between members": (lambda p: cut(p, header_of(p, 3)), r"is cut short: it ends at byte \d+, without the mark"),
    "broken header": (lambda p: overwrite(p, header_of(p, 3) + 20, b"XX"), r"is broken: at byte \d+ there should be"),
    "two in one": (lambda p: p.write_bytes(2 * p.read_bytes()), "several tars in one file"),
    "empty": (lambda p: p.write_bytes(b""), "is not a tar file: empty file"),
    "a web page": (lambda p: p.write_bytes(b"<html>404</html>" * 99), "is not a tar file"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(p.read_bytes())), "is compressed by gzip.*--gunzip-to"),
}


def header_of(path: Path, number: int) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[number].offset


@pytest.mark.parametrize("name", BREAKS)
def test_broken_tars_are_named(name: str, copy: Path, tmp_path: Path) -> None:
    destroy, message = BREAKS[name]
    destroy(copy / "sa_000001.tar")
    with pytest.raises(TarError, match=rf"1 of 3 tars cannot be indexed: file:///.*/sa_000001.tar .*{message}"):
        index(str(copy), str(tmp_path / "set"))
    assert set(files(tmp_path / "set")) == {"parts/sa_000000.tar.npz", "parts/sa_000002.tar.npz"}


def test_keys_that_occur_twice(copy: Path, tmp_path: Path) -> None:
    jpg = PICTURES[0][1]
    write_tar(copy / "sa_000003.tar", [("sa_3.jpg", jpg), ("sa_3.json", b"{}")])
    with pytest.raises(IndexingError, match=r"the key 'sa_3' occurs twice, in sa_000000.tar and in sa_000003.tar"):
        index(str(copy), str(tmp_path / "set"))
    write_tar(copy / "sa_000003.tar", [("a/x.jpg", jpg), ("x.json", b"{}"), ("b/x.jpg", jpg)])
    with pytest.raises(TarError, match=r"sa_000003.tar: the key 'x' occurs twice: 'a/x.jpg' and 'b/x.jpg'"):
        index(str(copy), str(tmp_path / "set"))
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_checklists(copy: Path, tmp_path: Path) -> None:
    checklist = copy / "checklist.chk"
    checked = index(str(copy), str(tmp_path / "md5"), checklist=str(checklist)).manifest
    assert [shard.sha256 for shard in checked.shards] == [None] * 3
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(copy.glob("*.tar"))}
    checklist.write_text("".join(f"{digest} *tars/{name}\n" for name, digest in digests.items()))
    indexed = index(str(copy), str(tmp_path / "md5"), checklist=str(checklist))
    assert indexed.num_read == 3  # they were not compared with these
    assert [shard.sha256 for shard in indexed.manifest.shards] == list(digests.values())
    checklist.write_text(checklist.read_text().replace(digests["sa_000001.tar"], 64 * "0"))
    with pytest.raises(
        TarError, match=rf"sa_000001.tar has the sha256 {digests['sa_000001.tar']}, the checklist says 0"
    ):
        index(str(copy), str(tmp_path / "sha256"), checklist=str(checklist))
    checklist.write_text(f"{32 * '0'}  sa_000000.tar\n")
    with pytest.raises(IndexingError, match=r"sa_000001.tar is not in the checklist"):
        index(str(copy), str(tmp_path / "sha256"), checklist=str(checklist))
    checklist.write_text("sa_000000.tar\n")
    with pytest.raises(ValueError, match=r"checklist.chk line 1: expected an md5 or sha256"):
        index(str(copy), str(tmp_path / "sha256"), checklist=str(checklist))


@pytest.mark.parametrize("where", ["file", "s3"])
def test_compressed_tars_are_written_elsewhere(
    where: str, tars: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for path in tars.glob("*.tar"):
        parts = np.array_split(np.frombuffer(path.read_bytes(), np.uint8), 2)  # gzip files may have several members
        (tmp_path / f"{path.name}.gz").write_bytes(b"".join(gzip.compress(part.tobytes()) for part in parts))
    plain = str(tmp_path / "plain") if where == "file" else f"{request.getfixturevalue('s3_bucket')}/plain"
    settings = {"match": "*.tar.gz", "gunzip_to": plain}
    manifest = index(str(tmp_path), str(tmp_path / "set"), **settings).manifest
    direct = index(str(tars), str(tmp_path / "direct")).manifest
    assert manifest.root == open_store(plain).url()
    assert manifest.index == direct.index
    for path in tars.glob("*.tar"):
        assert open_store(plain).get(path.name) == path.read_bytes()
    etags = [open_store(plain).etag(shard.name) for shard in manifest.shards]
    assert index(str(tmp_path), str(tmp_path / "set"), **settings).num_read == 0
    assert etags == [open_store(plain).etag(shard.name) for shard in manifest.shards]
    cut(tmp_path / "sa_000001.tar.gz", 2000)
    with pytest.raises(TarError, match=r"sa_000001.tar.gz is cut short: its compressed content has no end"):
        index(str(tmp_path), str(tmp_path / "set"), **settings)
    assert open_store(plain).get("sa_000001.tar") == (tars / "sa_000001.tar").read_bytes()


def test_compressed_and_plain_tars_do_not_mix(copy: Path, tmp_path: Path) -> None:
    (copy / "sa_000000.tar").write_bytes(gzip.compress((copy / "sa_000000.tar").read_bytes()))
    with pytest.raises(TarError, match=r"sa_000000.tar would be written over"):
        index(str(copy), str(tmp_path / "set"), gunzip_to=str(copy))
    with pytest.raises(TarError, match=r"sa_000001.tar is not compressed"):
        index(str(copy), str(tmp_path / "set"), gunzip_to=str(tmp_path / "plain"))


def test_sources_that_are_not_there(tars: Path, tmp_path: Path, s3_bucket: str, monkeypatch) -> None:
    out = str(tmp_path / "set")
    with pytest.raises(IndexingError, match=r"file:///no/folder: nothing there is called '\*.tar'"):
        index("/no/folder", out)
    with pytest.raises(IndexingError, match=r"nothing there is called 'x_\*'"):
        index(str(tars), out, match="x_*")
    with pytest.raises(IndexingError, match=r"s3://bucket-\d+/empty.*: nothing there is called"):
        index(f"{s3_bucket}/empty", out)
    with pytest.raises(MissingError, match=r"the bucket 'no-such-bucket' does not exist"):
        index("s3://no-such-bucket/sa-1b", out)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"rejects the credentials"):
        index(f"{s3_bucket}/sa-1b", out)
    assert not files(tmp_path)


def test_another_data_set_is_left_alone(tars: Path, packed: Path, tmp_path: Path) -> None:
    for other in (packed / "train", tmp_path / "set"):
        if not other.exists():
            index(str(shutil.copytree(tars, tmp_path / "elsewhere")), str(other))
        before = files(other)
        with pytest.raises(IndexingError, match="has another data set"):
            index(str(tars), str(other))
        assert files(other) == before
