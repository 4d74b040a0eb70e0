from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megadit.data.format.manifest import Manifest
from megadit.data.indexing.captions import CaptionTable
from megadit.data.indexing.dataset import index
from megadit.data.preview import CAPTION_LINES, LINE_HEIGHT, MARGIN, TILE, preview
from megadit.data.sa1b_like import make

CELL_HEIGHT = TILE + CAPTION_LINES * LINE_HEIGHT + 2 * MARGIN


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    make(str(tmp_path / "tars"), 8, samples_per_tar=4, short_side=200, num_masks=1)
    index(str(tmp_path / "tars"), str(tmp_path / "set"), captions=CaptionTable(str(tmp_path / "tars/captions.jsonl")))
    return tmp_path / "set"


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is drawn as text."""
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, text, *rest: (texts.append(text), draw(self, at, text, *rest))
    )
    return texts


def test_a_sheet_of_photographs_with_captions(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = written(monkeypatch)
    assert preview(str(raw), tmp_path / "a.png", num_samples=8, columns=3) == 8
    assert len(texts) == 8
    assert all(text.replace("\n", " ").startswith("a photograph of grace hopper, a ") for text in texts)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (3 * (TILE + MARGIN) + MARGIN, 3 * CELL_HEIGHT)
        pixels = np.asarray(sheet.convert("L"))
    for number in range(8):
        row, column = divmod(number, 3)
        top, left = row * CELL_HEIGHT + MARGIN, column * (TILE + MARGIN) + MARGIN
        picture = pixels[top : top + TILE, left : left + TILE]
        middle = picture[TILE // 2 - 20 : TILE // 2 + 20, TILE // 2 - 20 : TILE // 2 + 20]
        assert middle.std() > 5  # not the white of the sheet
        assert (pixels[top + TILE + 4 : top + TILE + 20, left : left + TILE] < 128).sum() > 50  # letters


def test_the_choice_is_that_of_the_seed(raw: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        preview(str(raw), tmp_path / name, num_samples=3, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_packed_pictures_and_captions_of_the_metadata(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = written(monkeypatch)
    total = Manifest.load(str(packed / "validation")).num_samples
    assert preview(str(packed / "validation"), tmp_path / "a.png", num_samples=1000) == total
    assert len(set(texts)) > total // 2  # captions, not keys
    assert not any(text.startswith("1f") for text in texts)


def test_long_captions_end_in_dots(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"key": "sa_1", "caption": "%s"}\n' % ("word " * 100 + "x" * 300))
    index(str(tmp_path / "tars"), str(raw), captions=CaptionTable(str(table)))
    texts = written(monkeypatch)
    preview(str(raw), tmp_path / "a.png")
    assert texts[0].endswith("...")
    assert len(texts[0].splitlines()) == CAPTION_LINES


def test_a_data_set_without_pictures(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(str(packed / "train")).model_copy(update={"image": None})
    monkeypatch.setattr(Manifest, "load", staticmethod(lambda url: manifest))
    with pytest.raises(
        ValueError, match=r"has no pictures to show, only .*text.npy.*; preview what it was packed from"
    ):
        preview(str(packed / "train"), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
