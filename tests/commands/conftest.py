"""A folder in which the documented commands run, forked from a server, with the files that they name."""

import itertools
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
import yaml

from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.packing.pack import pack
from megadit.data.packing.settings import PackSettings
from megadit.data.packing.sources import open_source
from megadit.data.sa1b_like import make as make_sa1b
from megadit.data.storage import open_store
from megadit.data.storage.local_s3 import LocalS3
from megadit.models import build
from megadit.objectives.image_encoder import ImageEncoder
from megadit.recipe import load

WORKER = Path(__file__).parents[1] / "workers" / "command.py"
TABLE = Path(__file__).parent / "shrunk.yaml"
SECONDS = 240


class Shrunk(NamedTuple):
    """How an example is shrunk: see the head of shrunk.yaml."""

    needs: Sequence[str] = ()
    add: str = ""
    replace: Mapping[str, str] = MappingProxyType({})
    writes: Sequence[str] = ()
    exit_code: int = 0
    slow: str = ""
    until: str = ""
    says: str = ""

    def words(self, arguments: Sequence[str]) -> list[str]:
        missing = [old for old in self.replace if not any(old in word for word in arguments)]
        assert not missing, f"shrunk.yaml replaces {missing}, which {' '.join(arguments)!r} does not have"
        words = list(arguments)
        for old, new in self.replace.items():
            words = [word.replace(old, new) for word in words]
        return words + self.add.split()


def read_table() -> dict[str, Shrunk]:
    """By command, in words as a shell has them."""
    sections = yaml.safe_load(TABLE.read_text())
    del sections["unfinished"]
    lists = sections.pop("words")
    table = {}
    for command, entry in sections.items():
        values = dict(entry or {})
        values["add"] = values.get("add", "").format(**lists)
        table[command] = Shrunk(**values)
    return table


class Ended(NamedTuple):
    exit_code: int
    said: str


class Sandbox:
    """The folder, an S3 server, and what was made so far; each command and each need runs once."""

    def __init__(self, folder: Path, server: LocalS3) -> None:
        self.folder, self._server = folder, server
        self.table = read_table()
        self._environment = {**os.environ, **server.environment}
        self._ended: dict[tuple[str, ...], Ended] = {}
        self._made: set[str] = set()
        self._numbers = itertools.count()
        self._makers: dict[str, Callable[[], None]] = {
            "photos": self._photos,
            "sa-1b": self._sa1b,
            "files": self._files,
            "latents": self._latents,
            "geneval": self._geneval,
        }

    @cached_property
    def _processes(self) -> multiprocessing.context.ForkServerContext:
        return multiprocessing.get_context("forkserver")  # with what run_ranks preloads

    def need(self, name: str) -> None:
        """Make something that is not made by a command, or run the example that makes it."""
        if name not in self._made:
            if name in self._makers:
                self._makers[name]()
            else:
                ended = self.example(name)
                assert ended.exit_code == 0, f"{name}: {ended.said}"
            self._made.add(name)

    def example(self, command: str) -> Ended:
        """Run an example of the table, shrunk, after what it needs."""
        shrunk = self.table[command]
        for name in shrunk.needs:
            self.need(name)
        return self.run(shrunk.words(shlex.split(command)), shrunk.until)

    def run(self, words: Sequence[str], until: str = "") -> Ended:
        key = tuple(words)
        if key not in self._ended:
            self._ended[key] = self._run(words, until)
        return self._ended[key]

    def _run(self, words: Sequence[str], until: str) -> Ended:
        log = self.folder / f"command-{next(self._numbers)}.log"
        task = {"words": list(words), "folder": self.folder, "log": log, "environment": self._environment}
        process = self._processes.Process(target=runpy.run_path, args=(str(WORKER), task))
        process.start()
        deadline = time.monotonic() + SECONDS
        while process.is_alive() and time.monotonic() < deadline:
            process.join(0.1)
            if until and log.exists() and until in log.read_text():
                os.kill(process.pid, signal.SIGINT)
                until = ""
        if process.exitcode is None:
            process.terminate()
            process.join(30)
            process.kill()
        return Ended(process.exitcode, log.read_text() if log.exists() else "")

    def _photos(self) -> None:
        """In photos/: pictures and captions.jsonl as a folder to pack, and a tar of them to index."""
        raw, photos = self.folder / "photos-raw", self.folder / "photos"
        make_sa1b(str(raw), 6, samples_per_tar=6, short_side=48)
        (photos / "images").mkdir(parents=True)
        shutil.copy(raw / "captions.jsonl", photos)
        captions = {line["key"]: line["caption"] for line in _lines(photos / "captions.jsonl")}
        with tarfile.open(raw / "sa_000000.tar") as source, tarfile.open(photos / "photos.tar", "w") as tar:
            for member in source:
                path = photos / "images" / Path(member.name).name
                if path.suffix == ".jpg":
                    path.write_bytes(source.extractfile(member).read())
                    tar.add(path, path.name)
                    (raw / f"{path.stem}.txt").write_text(captions[path.stem])
                    tar.add(raw / f"{path.stem}.txt", f"{path.stem}.txt")

    def _sa1b(self) -> None:
        """SA-1B's tars in s3://sa-1b, its checklist and captions in the working folder."""
        raw = self.folder / "sa-1b"
        make_sa1b(str(raw), 24, samples_per_tar=8, short_side=64)
        shutil.copy(raw / "checklist.chk", self.folder)
        with tarfile.open(self.folder / "SA1B_caption.tar.gz", "w:gz") as tar:
            for line in _lines(raw / "captions.jsonl"):
                path = raw / f"{line['key']}.txt"
                path.write_text(line["caption"])
                tar.add(path, path.name)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._server.environment.items():
                patch.setenv(name, value)
            for path in raw.glob("*.tar"):
                open_store("s3://sa-1b").put(path.name, path.read_bytes())

    def _files(self) -> None:
        """Lists of prompts, recipes, a section of evaluation, a checkpoint as DiT's authors published it."""
        for name in ("prompts.txt", "mine.txt"):
            (self.folder / name).write_text("cat\nred heart\n")
        (self.folder / "my.yaml").write_text("extends: quickstart\nname: my\n")
        (self.folder / "big.yaml").write_text(
            "extends: dit-mup-search-cpu\nname: big\nmodel: {width: 256, num_classes: 8}\n"
        )
        tasks = [{"task": "prompts", "prompts": "prompts.txt", "num_steps": 2}]
        (self.folder / "eval.yaml").write_text(
            yaml.safe_dump({"eval": {"weights": ".", "batch_size": 2, "tasks": tasks}})
        )
        model = build(load("dit-xl2-sp", ["model.width=72", "model.depth=2"]).model)
        torch.save(model.state_dict(), self.folder / "DiT-XL-2-256x256.pt")

    def _geneval(self) -> None:
        """A run called big, and a list of as many prompts as GenEval's."""
        self.need("train quickstart")
        (self.folder / "runs" / "big").symlink_to(self.folder / "runs" / "quickstart")
        tags = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
        lines = [
            {"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": f"{tag} {number}"}
            for tag, count in tags.items()
            for number in range(count)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.folder / "evaluation_metadata.jsonl").write_text(text)

    def _latents(self) -> None:
        """In latents/: a pack of latents, of one class, with features of text and of an image encoder."""
        settings = PackSettings(
            size=16, holdout=8, where=("subgroup=animal-bird", "skin_tone=false"), label="subgroup", feature_grid=4
        )
        models = self.folder / "models"
        vae, dinov2 = Autoencoder.load(str(models / "sd-vae")), ImageEncoder.load(str(models / "dinov2-base"))
        pack(open_source("emoji"), str(self.folder / "latents"), settings, TextEncoder.load("minilm"), vae, dinov2)


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def sandbox(
    tmp_path_factory: pytest.TempPathFactory, t5_folder: Path, vae_folder: Path, repa_folder: Path, run_ranks: object
) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "models").mkdir()
    folders = {"t5": t5_folder, "t5-v1_1-xxl": t5_folder, "sd-vae": vae_folder, "sd3-vae": vae_folder}
    for name, source in {**folders, "dinov2-base": repa_folder}.items():
        (folder / "models" / name).symlink_to(source)
    with LocalS3(tmp_path_factory.mktemp("s3-of-commands")) as server:
        for bucket in ("megadit", "sa-1b", "mine"):
            server.create_bucket(bucket)
        yield Sandbox(folder, server)
