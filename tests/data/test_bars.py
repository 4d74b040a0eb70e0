"""Every command over whole data sets says how far it is: on a terminal, and nowhere else."""

import contextlib
import gzip
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megadit.data.indexing.captions import CaptionTable
from megadit.data.indexing.dataset import add_captions, index
from megadit.data.inspect import verify
from megadit.data.packing.pack import pack
from megadit.data.packing.settings import PackSettings
from megadit.data.packing.sources import open_source
from megadit.data.sa1b_like import make


class Drawn:
    """The bars that were drawn, with what each was told."""

    def __init__(self) -> None:
        self.bars: dict[str, list[tuple[int, int]]] = {}

    @contextlib.contextmanager
    def __call__(self, description: str) -> Iterator[Callable[[int, int], None]]:
        reports = self.bars[description] = []
        yield lambda done, total: reports.append((done, total))

    def assert_whole(self, *descriptions: str) -> None:
        """These bars and no others, in this order, each of which went from the start to the end."""
        assert list(self.bars) == list(descriptions)
        for reports in self.bars.values():
            assert len({total for _, total in reports}) == 1
            assert reports == sorted(reports)
            assert reports[-1][0] == reports[-1][1] > 0


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three compressed tars and their captions."""
    folder = tmp_path_factory.mktemp("tars")
    make(str(folder), 14, samples_per_tar=5, short_side=48, num_masks=2)
    for path in folder.glob("*.tar"):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


def test_each_part_of_the_work_has_a_bar(tars: Path, tmp_path: Path) -> None:
    captions, indexed = CaptionTable(str(tars / "captions.jsonl")), str(tmp_path / "set")
    compressed = sum(path.stat().st_size for path in tars.glob("*.tar.gz"))
    drawn = Drawn()
    plain = {"match": "*.tar.gz", "gunzip_to": str(tmp_path / "plain")}
    index(str(tars), indexed, captions=captions, bars=drawn, **plain)
    drawn.assert_whole("unpacking tars", "reading tars", "reading captions", "writing captions")
    assert drawn.bars["unpacking tars"][-1][1] == compressed
    assert drawn.bars["reading captions"][-1][1] == (tars / "captions.jsonl").stat().st_size

    drawn = Drawn()  # what was unpacked before counts, too
    index(str(tars), str(tmp_path / "again"), bars=drawn, **plain)
    drawn.assert_whole("unpacking tars", "reading tars")

    drawn = Drawn()
    add_captions(indexed, captions, drawn)
    drawn.assert_whole("reading captions", "writing captions")

    drawn = Drawn()
    assert verify(indexed, bars=drawn) == []
    drawn.assert_whole("verifying")
    assert drawn.bars["verifying"][-1] == (6, 6)  # three tars, three files of captions

    drawn = Drawn()
    assert pack(open_source(indexed), str(tmp_path / "packed"), PackSettings(8, shard_samples=4, holdout=0), bars=drawn)
    drawn.assert_whole("packing")
    assert drawn.bars["packing"] == [(4, 14), (8, 14), (12, 14), (14, 14)]


def test_bars_are_for_terminals(tars: Path, tmp_path: Path) -> None:
    plain = ["--match", "*.tar.gz", "--gunzip-to", "plain", "--captions", str(tars / "captions.jsonl")]
    command = [sys.executable, "-P", "-m", "megadit", "data", "index", str(tars), "set", *plain]
    ours, theirs = pty.openpty()
    environ = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, cwd=tmp_path, env=environ) as process:
        os.close(theirs)
        shown = "".join(read_all(ours))
        assert process.stdout is not None
        told = process.stdout.read()
    for part in ("unpacking tars", "reading tars", "reading captions", "writing captions"):
        assert part in shown
    assert b"14 samples in 3 tars" in told
    elsewhere = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environ, timeout=120)
    assert elsewhere.stderr == b""
    assert elsewhere.stdout == told.replace(b"read 3 tars", b"read 0 tars")


def read_all(terminal: int) -> Iterator[str]:
    """What is written to a terminal until nobody has it open any more."""
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 4096):
            yield data.decode(errors="replace")
    os.close(terminal)
