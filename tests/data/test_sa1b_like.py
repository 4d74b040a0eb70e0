import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from megadit.data.sa1b_like import annotate, encode_runs, make


def test_tars_have_the_layout_of_sa1b(tmp_path: Path) -> None:
    make(str(tmp_path), 5, samples_per_tar=2, short_side=60, num_masks=3)
    tars = sorted(tmp_path.glob("*.tar"))
    assert [path.name for path in tars] == ["sa_000000.tar", "sa_000001.tar", "sa_000002.tar"]
    captions = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [line["key"] for line in captions] == [f"sa_{number}" for number in range(1, 6)]
    seen = []
    for path, line in zip(tars, (tmp_path / "checklist.chk").read_text().splitlines(), strict=True):
        assert line == f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}"
        with tarfile.open(path) as tar:
            assert tar.getnames()[0].startswith("./sa_")
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            record, key = json.loads(sample["json"]), sample["__key__"].rpartition("/")[2]
            with Image.open(io.BytesIO(sample["jpg"])) as picture:
                assert min(picture.size) == 60
                assert picture.size == (record["image"]["width"], record["image"]["height"])
                assert np.asarray(picture).std() > 20  # a photograph, not a flat colour
            assert record["image"]["file_name"] == f"{key}.jpg"
            assert f"sa_{record['image']['image_id']}" == key
            assert len(record["annotations"]) == 3
            assert record["annotations"][0]["segmentation"]["size"] == [picture.size[1], picture.size[0]]
            seen.append(key)
    assert seen == [line["key"] for line in captions]


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(str(tmp_path / name), 2, short_side=32, seed=seed)
    a, b, c = ((tmp_path / name / "sa_000000.tar").read_bytes() for name in "abc")
    assert a == b != c


def test_photographs_of_a_folder(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    with pytest.raises(ValueError, match="no photographs there"):
        make(str(tmp_path / "out"), 1, photos=photos)
    Image.new("RGB", (90, 70), "red").save(photos / "a_red_wall.png")
    make(str(tmp_path / "out"), 1, short_side=16, photos=photos)
    assert "a photograph of a red wall" in (tmp_path / "out" / "captions.jsonl").read_text()


def test_run_lengths_are_those_of_pycocotools() -> None:
    """The text is that of pycocotools 2.0.11: mask.encode of the mask that mask.decode makes of it."""
    (annotation,) = annotate(1, 24, 16, 1, 0)["annotations"]
    assert annotation["segmentation"] == {"size": [16, 24], "counts": "c13<2O001O0000O10^6"}
    assert annotation["area"] == 41
    ones = np.array([1])
    assert encode_runs(ones, np.array([0]), np.array([300]), 300, 2) == "\\9\\9"  # 300 zeros, 300 ones
