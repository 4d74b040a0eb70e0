import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megadit.data.manifest import Index, Manifest, ManifestError
from megadit.data.storage import open_store


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


def test_round_trip(packed: Path) -> None:
    url = str(packed / "train")
    manifest = Manifest.load(url)
    assert (packed / "train" / "manifest.json").read_bytes() == manifest.dump()
    data = (packed / "train" / "index.npz").read_bytes()
    index = manifest.load_index(open_store(url))
    assert index.to_bytes() == data
    assert index.keys.shape == index.shard.shape == (manifest.num_samples,)
    assert np.bincount(index.shard).tolist() == [shard.samples for shard in manifest.shards]
    assert index.offset["png"].dtype == np.int64


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=rf"no data set at {tmp_path}: .*manifest.json does not exist"):
        Manifest.load(str(tmp_path))


def test_a_bucket_that_is_missing(s3_bucket: str) -> None:
    with pytest.raises(ManifestError, match=r"no data set at s3://nowhere/x: .* the bucket 'nowhere' does not exist"):
        Manifest.load("s3://nowhere/x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(version=2), r"format version 2; this megadit reads version 1"),
        (lambda tree: tree.pop("version"), r"format version None"),
        (lambda tree: tree["image"].update(size="big"), r"image.size: Input should be a valid integer"),
        (lambda tree: tree.update(extra=1), r"extra: Extra inputs are not permitted"),
        (lambda tree: tree.update(num_samples=5), r"do not have the 5 samples"),
        (lambda tree: tree["shards"][0].update(bucket="16x32"), r"resolution buckets 16x16, 16x32; only one"),
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
    shutil.copy(packed / "validation" / "index.npz", copy)
    with pytest.raises(ManifestError, match=r"index.npz: the index does not belong to the manifest"):
        Manifest.load(str(copy)).load_index(open_store(str(copy)))


def test_an_index_with_python_objects_is_refused(packed: Path, tmp_path: Path) -> None:
    with np.load(packed / "train" / "index.npz") as columns:
        np.savez(tmp_path / "evil.npz", **(dict(columns) | {"keys": np.array([print], dtype=object)}))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Index.from_bytes((tmp_path / "evil.npz").read_bytes())
