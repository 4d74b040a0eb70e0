import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megadit.data.packing.source import SourceError, concept
from megadit.data.packing.sources import open_source

RECORDS = [
    {"key": "red", "caption": "a red square", "tags": ["red"]},
    {"key": "clear", "caption": "nothing", "hidden": True},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "images" / "red.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "images" / "clear.webp", lossless=True)
    write(tmp_path, RECORDS)
    return tmp_path


def write(folder: Path, records: list) -> None:
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(record) for record in records))


def test_folder_and_zip_are_one(folder: Path) -> None:
    archive = folder.parent / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in [folder / "captions.jsonl", *(folder / "images").iterdir()]:
            file.write(path, path.relative_to(folder))
    sources = [open_source(str(path)) for path in (folder, archive)]
    for source in sources:
        assert list(source.metadata.values()) == RECORDS
        assert source.image("red").getpixel((0, 0)) == (255, 0, 0)
        assert source.image("clear").getpixel((0, 0)) == (255, 255, 255)
        assert source.image("clear").mode == "RGB"
        assert source.select(["hidden=true"]).tolist() == [1]
        assert [source.key(number) for number in (0, 1)] == ["red", "clear"]
        assert source.sizes(np.array([1, 0])).tolist() == [[4, 4], [4, 4]]
    assert sources[0].digest == sources[1].digest
    Image.new("RGB", (4, 4), (254, 0, 0)).save(folder / "images" / "red.png")
    assert open_source(str(folder)).digest != sources[0].digest


def test_the_shipped_pictures() -> None:
    source = open_source("emoji")
    assert len(source.metadata) == 3372
    assert source.metadata["1f98a"]["caption"] == "fox"
    assert source.image("1f98a").size == (128, 128)
    assert len(source.select(["skin_tone=false"])) == 1852
    assert len(source.select(["group=animals-nature", "skin_tone=false"])) == 157


def test_every_skin_tone_shares_its_concept_with_a_plain_picture() -> None:
    records = open_source("emoji").metadata.values()
    plain = {concept(record["key"]) for record in records if not record["skin_tone"]}
    toned = [concept(record["key"]) for record in records if record["skin_tone"]]
    assert len(toned) == 1520
    assert set(toned) <= plain


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"key": "red"}], r"line 1: a line is an object with the texts key and caption"),
        ([["red"]], r"line 1: a line is an object"),
        ([RECORDS[0], RECORDS[0]], r"line 2: the key 'red' occurs twice"),
        ([{"key": "a.b", "caption": ""}], r"line 1: the key 'a.b' may have letters"),
        ([{"key": "../x", "caption": ""}], r"line 1: the key '../x' may have letters"),
        ([{"key": "lost", "caption": ""}], r"1 pictures are missing, the first is images/lost"),
        ([], r"captions.jsonl is empty"),
    ],
)
def test_bad_captions(folder: Path, records: list, message: str) -> None:
    write(folder, records)
    with pytest.raises(SourceError, match=message):
        open_source(str(folder))


def test_bad_sources(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(
        SourceError, match=r"no source 'emojis': give a folder, a zip file, a data set .* or one of emoji"
    ):
        open_source("emojis")
    with pytest.raises(SourceError, match="not a zip file"):
        open_source(str(folder / "captions.jsonl"))
    with pytest.raises(SourceError, match=r"captions.jsonl is missing"):
        open_source(str(tmp_path_factory.mktemp("empty")))
    (folder / "captions.jsonl").write_text('{"key": ')
    with pytest.raises(SourceError, match=r"line 1: not JSON"):
        open_source(str(folder))


def test_bad_conditions_and_pictures(folder: Path) -> None:
    source = open_source(str(folder))
    with pytest.raises(SourceError, match=r"no picture has the field 'size'; there are caption, hidden, key, tags"):
        source.select(["size=3"])
    with pytest.raises(SourceError, match="no picture fulfils hidden=false"):
        source.select(["hidden=false"])
    with pytest.raises(SourceError, match="not of the form field=value"):
        source.select(["hidden"])
    (folder / "images" / "red.png").write_bytes(b"no picture")
    with pytest.raises(SourceError, match="the picture 'red' cannot be decoded"):
        open_source(str(folder)).image("red")
