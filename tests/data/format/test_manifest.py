import hashlib
import json
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megadit.data.format.index import PLACE
from megadit.data.format.manifest import Manifest, ManifestError
from megadit.data.storage import StorageError, open_store


def edit(folder: Path, change: Callable[[dict], object]) -> str:
    """Change manifest.json of a data set; its address."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    return str(folder)


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed / "train", tmp_path / "copy"))


def test_round_trip(packed: Path, tmp_path: Path) -> None:
    url = str(packed / "train")
    manifest = Manifest.load(url)
    assert (packed / "train" / "manifest.json").read_bytes() == manifest.dump()
    index = manifest.load_index(open_store(url))
    assert index.keys.shape == (manifest.num_samples,)
    assert index.places["png"].dtype == PLACE
    assert PLACE.itemsize == 16
    assert isinstance(index.keys.base, mmap.mmap)
    assert index.write(open_store(str(tmp_path))) == manifest.index
    for path in (packed / "train" / "index").iterdir():
        assert (tmp_path / "index" / path.name).read_bytes() == path.read_bytes()


def test_an_index_in_s3_is_copied_once(packed: Path, s3_bucket: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MEGADIT_CACHE", str(tmp_path))
    manifest, store = Manifest.load(str(packed / "train")), open_store(f"{s3_bucket}/indexed")
    original = manifest.load_index(open_store(str(packed / "train")))
    original.write(store)
    index = manifest.load_index(store)
    copies = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(copies) == len(manifest.index)
    assert isinstance(index.keys.base, mmap.mmap)
    assert all(np.array_equal(index.places[kind], original.places[kind]) for kind in manifest.members)
    manifest.load_index(store)
    assert copies == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    store.put("index/key.npy", b"another")
    (tmp_path / manifest.index["key"][:2] / f"{manifest.index['key']}-key.npy").unlink()
    with pytest.raises(StorageError, match=r"s3://.*/index/key.npy: this file does not belong to the manifest"):
        manifest.load_index(store)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=rf"no data set at {tmp_path}: .*manifest.json does not exist"):
        Manifest.load(str(tmp_path))


def test_a_bucket_that_is_missing(s3_bucket: str) -> None:
    with pytest.raises(ManifestError, match=r"no data set at s3://nowhere/x: .* the bucket 'nowhere' does not exist"):
        Manifest.load("s3://nowhere/x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(version=1), r"format version 1; this megadit reads version 2"),
        (lambda tree: tree.pop("version"), r"format version None"),
        (lambda tree: tree["text"].update(dim="big"), r"text.dim: Input should be a valid integer"),
        (lambda tree: tree.update(extra=1), r"extra: Extra inputs are not permitted"),
        (lambda tree: tree.update(num_samples=5), r"do not have the 5 samples"),
        (
            lambda tree: tree["shards"][0].update(bucket=None),
            r"some shards have a resolution bucket and some",
        ),
        (lambda tree: tree.update(labels=["cat", "dog"]), r"the fingerprint does not belong"),
        (lambda tree: tree["shards"].reverse(), r"the fingerprint does not belong"),
    ],
)
def test_a_manifest_that_is_wrong(copy: Path, change: Callable[[dict], object], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        Manifest.load(edit(copy, change))


def test_a_manifest_that_is_no_json(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(ManifestError, match="not JSON"):
        Manifest.load(str(copy))


def test_an_index_of_another_data_set(copy: Path, packed: Path) -> None:
    shutil.copy(packed / "validation" / "index" / "key.npy", copy / "index")
    with pytest.raises(StorageError, match=r"index/key.npy: this file does not belong to the manifest"):
        Manifest.load(str(copy)).load_index(open_store(str(copy)))


def test_an_index_with_python_objects_is_refused(copy: Path) -> None:
    def names_it(tree: dict) -> None:
        np.save(copy / "index" / "key.npy", np.array([print], dtype=object))
        tree["index"]["key"] = hashlib.sha256((copy / "index" / "key.npy").read_bytes()).hexdigest()

    edit(copy, names_it)
    with pytest.raises(ManifestError, match="fingerprint"):
        Manifest.load(str(copy))
    edit(copy, lambda tree: tree.update(fingerprint=Manifest.model_validate(tree).sealed().fingerprint))
    with pytest.raises(ValueError, match="Python objects"):
        Manifest.load(str(copy)).load_index(open_store(str(copy)))
