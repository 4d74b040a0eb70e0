import hashlib
import io
import json
import resource
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageOps

from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.format.manifest import Manifest
from megadit.data.packing.settings import PackError
from megadit.data.packing.source import SourceError, concept
from megadit.data.packing.sources import open_source
from megadit.data.storage import StorageError, open_store


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_splits(packed: Path) -> None:
    keys = {}
    for split in ("train", "validation"):
        index = Manifest.load(str(packed / split)).load_index(open_store(str(packed / split)))
        keys[split] = [key.decode() for key in index.keys]
    source = open_source("emoji")
    selected = [source.key(number) for number in source.select(["group=animals-nature", "skin_tone=false"])]
    assert sorted(keys["train"] + keys["validation"]) == sorted(selected)
    assert 0.02 < len(keys["validation"]) / len(selected) < 0.3
    assert keys["train"] != [key for key in selected if key in set(keys["train"])]  # shuffled


def test_the_held_out_share_does_not_depend_on_seed_and_size(
    pack_animals: Callable, packed: Path, tmp_path: Path
) -> None:
    pack_animals(str(tmp_path), seed=4, size=8, shard_samples=1000)
    first, second = (
        Manifest.load(str(folder / "validation")).load_index(open_store(str(folder / "validation"))).keys.tolist()
        for folder in (packed, tmp_path)
    )
    assert sorted(first) == sorted(second)
    assert first != second


def test_variants_of_a_picture_stay_together(pack_animals: Callable, tmp_path: Path) -> None:
    pack_animals(str(tmp_path), where=["subgroup=hand-fingers-open"], holdout=3, size=8)
    concepts = [
        {concept(key.decode()) for key in Manifest.load(url).load_index(open_store(url)).keys}
        for url in (str(tmp_path / "train"), str(tmp_path / "validation"))
    ]
    assert all(concepts)
    assert not concepts[0] & concepts[1]


def test_tar_tools_and_the_index_agree(packed: Path, encoder: TextEncoder) -> None:
    folder = packed / "train"
    manifest = Manifest.load(str(folder))
    index = manifest.load_index(open_store(str(folder)))
    source = open_source("emoji")
    sample = 0
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.num_bytes, shard.sha256)
        listed = subprocess.run(["tar", "-tf", folder / shard.name], capture_output=True, text=True, check=True)
        with tarfile.open(folder / shard.name) as tar:
            members = tar.getmembers()
            assert [member.name for member in members] == listed.stdout.split()
            assert len(members) == shard.num_samples * len(manifest.members)
            for place, member in enumerate(members):
                row, column = divmod(place, len(manifest.members))
                row, kind = row + sample, manifest.members[column]
                assert member.name == f"{index.keys[row].decode()}.{kind}"
                assert (member.offset_data, member.size) == tuple(index.places[kind][row].item()[:2])
                content = tar.extractfile(member)
                assert content is not None
                assert zlib.crc32(content.read()) == index.places[kind][row]["crc32"]
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
        sample += shard.num_samples
    caption = source.metadata[index.keys[0].decode()]["caption"]
    with tarfile.open(folder / manifest.shards[0].name) as tar:
        content = tar.extractfile(f"{index.keys[0].decode()}.text.npy")
        assert content is not None
        stored = np.load(io.BytesIO(content.read()))
    np.testing.assert_allclose(stored, encoder.encode([caption])[0].tokens.numpy(), atol=2e-3)


def test_webdataset_reads_the_shards(packed: Path) -> None:
    source, count = open_source("emoji"), 0
    shards = sorted(str(path) for path in (packed / "train").glob("*.tar"))
    assert len(shards) > 1
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("pil"):
        key = sample["__key__"]
        assert sample["json"] == source.metadata[key]
        assert sample["txt"] == source.metadata[key]["caption"]
        expected = ImageOps.fit(source.image(key), (16, 16), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(sample["png"]), np.asarray(expected))
        assert sample["text.npy"].dtype == sample["pooled.npy"].dtype == np.float16
        assert sample["text.npy"].shape[1:] == sample["pooled.npy"].shape == (384,)
        count += 1
    assert count == Manifest.load(str(packed / "train")).num_samples


def test_packing_twice_gives_equal_bytes_on_s3_too(
    pack_animals: Callable, packed: Path, tmp_path: Path, s3_bucket: str
) -> None:
    calls: list[tuple[int, int]] = []
    result = pack_animals(str(tmp_path), on_progress=lambda done, total: calls.append((done, total)))
    assert files(tmp_path) == files(packed)
    assert not result.skipped
    assert calls[-1] == (157, 157)
    pack_animals(f"{s3_bucket}/emoji")
    store = open_store(f"{s3_bucket}/emoji")
    assert {name: store.get(name) for name in store.list()} == files(packed)


def test_what_is_there_is_kept(pack_animals: Callable, tmp_path: Path) -> None:
    first = pack_animals(str(tmp_path))
    before = files(tmp_path)
    again = pack_animals(str(tmp_path))
    assert again.skipped
    assert (again.train, again.validation) == (first.train, first.validation)
    with pytest.raises(PackError, match=r"/train has another data set \(emoji/train, \d+ samples, 16x16, "):
        pack_animals(str(tmp_path), size=8)
    assert files(tmp_path) == before


def test_a_broken_pack_is_no_data_set_and_is_mended(pack_animals: Callable, packed: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in packed.rglob("*.tar"))

    def fill_the_disk(done: int, total: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 4, limits[1]))

    try:
        with pytest.raises(StorageError, match=r"cannot write .*shard-000001.tar: File too large"):
            pack_animals(str(tmp_path), on_progress=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(files(tmp_path)) == ["pack.json", "train/shard-000000.tar", "train/shards/shard-000000.json"]
    assert not pack_animals(str(tmp_path)).skipped
    assert files(tmp_path) == files(packed)
    (tmp_path / "validation" / "manifest.json").unlink()  # broken between the two
    assert not pack_animals(str(tmp_path)).skipped
    assert files(tmp_path) == files(packed)


def test_the_fingerprint_is_of_the_contents(pack_animals: Callable, packed: Path, tmp_path: Path) -> None:
    original = Manifest.load(str(packed / "train"))
    fewer = pack_animals(str(tmp_path / "shards"), shard_samples=49).train
    other = pack_animals(str(tmp_path / "seed"), seed=5).train
    assert len({manifest.fingerprint for manifest in (original, fewer, other)}) == 3
    assert len({manifest.inputs for manifest in (original, fewer, other)}) == 3
    assert json.loads((packed / "train" / "manifest.json").read_text())["text"]["encoder"] == "minilm"


def test_labels_are_the_classes_of_both_splits(pack_animals: Callable, packed: Path, tmp_path: Path) -> None:
    result = pack_animals(str(tmp_path), label="subgroup")
    source = open_source("emoji")
    chosen = source.select(["group=animals-nature", "skin_tone=false"])
    selected = [source.metadata[source.key(number)]["subgroup"] for number in chosen]
    assert result.train.labels == result.validation.labels == tuple(sorted(set(selected)))
    seen = set()
    for split, manifest in (("train", result.train), ("validation", result.validation)):
        index = manifest.load_index(open_store(str(tmp_path / split)))
        assert index.labels is not None
        assert index.labels.dtype == np.int32
        for key, number in zip(index.keys, index.labels, strict=True):
            assert manifest.labels[number] == source.metadata[key.decode()]["subgroup"]
        seen |= set(index.labels.tolist())
        assert Manifest.load(str(tmp_path / split)) == manifest
        plain = Manifest.load(str(packed / split))
        assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in plain.shards]
        assert len({manifest.fingerprint, plain.fingerprint}) == len({manifest.inputs, plain.inputs}) == 2
    assert seen == set(range(len(result.train.labels)))
    assert pack_animals(str(tmp_path), label="subgroup").skipped
    with pytest.raises(PackError, match="has another data set"):
        pack_animals(str(tmp_path))


def test_a_pack_without_labels_says_nothing_of_them(packed: Path) -> None:
    assert Manifest.load(str(packed / "train")).labels == ()
    assert not (packed / "train" / "index" / "label.npy").exists()


def test_a_picture_without_a_label(pack_animals: Callable, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"label 'colour': the picture '[-\w]+' has no text in that field; .*subgroup"
    ):
        pack_animals(str(tmp_path), label="colour")
    with pytest.raises(SourceError, match="label 'skin_tone': .* has no text in that field"):
        pack_animals(str(tmp_path), label="skin_tone")
    assert not files(tmp_path)


@pytest.mark.parametrize(("setting", "value"), [("size", 0), ("shard_samples", 0), ("holdout", 1), ("holdout", -2)])
def test_bad_settings(pack_animals: Callable, tmp_path: Path, setting: str, value: int) -> None:
    with pytest.raises(PackError, match=f"{setting} {value} must be at least"):
        pack_animals(str(tmp_path), **{setting: value})
    with pytest.raises(PackError, match="leave validation empty"):
        pack_animals(str(tmp_path), holdout=10**9)
    assert not files(tmp_path)
