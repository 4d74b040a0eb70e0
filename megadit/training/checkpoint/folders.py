"""The folder of a checkpoint: its header, how damage shows, how it appears at once, which ones stay."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megadit import checksums
from megadit.files import PARTIAL

FORMAT = 2
HEADER, METADATA = "checkpoint.json", ".metadata"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used."""


class DamageError(CheckpointError):
    """A checkpoint that is not as it was written; the one before may be."""


@dataclass(frozen=True)
class Header:
    """What checkpoint.json says."""

    format: int
    images_seen: int
    num_steps: int  # of the optimizer, since its state began
    shapes: dict[str, list[int]]  # of the parameters, by name
    averages: list[str]
    files: dict[str, int]  # name -> bytes
    index_crc: int  # CRC-32 of .metadata, which has those of the data files
    # Of the optimizer; the headers of versions before 0.2, which had AdamW alone, do not say them.
    slots: list[str] = field(default_factory=lambda: ["exp_avg", "exp_avg_sq"])
    stage: int = 0  # the stage that was trained last, from 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all files that the header lists."""
        return sum(self.files.values())


def folder_name(images_seen: int) -> str:
    """Sorted by name, checkpoints are sorted by age."""
    return f"images-{images_seen:010d}"


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints of a folder, damaged ones too."""
    return sorted(folder.glob("images-*"), reverse=True)


def images_seen(path: Path) -> int:
    """What the name of a checkpoint says."""
    return int(path.name.removeprefix("images-"))


def existing(run: Path, images: Sequence[int]) -> list[Path]:
    """The checkpoints of a run, oldest first; with `images`, those of so many images seen.

    Raises CheckpointError where there is none, or not one that is asked for.
    """
    there = {images_seen(path): path for path in reversed(newest_first(run / "checkpoints"))}
    if not there:
        raise CheckpointError(f"{run} has no checkpoint")
    if missing := [number for number in images if number not in there]:
        raise CheckpointError(f"{run} has no checkpoint of {missing[0]} images seen; there are: {list(there)}")
    return [path for number, path in there.items() if not images or number in images]


def read_header(path: Path) -> Header:
    """What checkpoint.json says. Raises OSError and ValueError when it cannot be read or has changed."""
    return parse_header((path / HEADER).read_bytes(), path)


def parse_header(content: bytes, path: object) -> Header:
    """The header in the bytes of a checkpoint.json; `path` is for the messages. Raises ValueError."""
    sealed = json.loads(content)
    if not isinstance(sealed, dict) or sealed.get("crc32") != _crc32_of_tree(sealed.get("header")):
        raise ValueError(f"{HEADER} of {path} has changed: its CRC-32 differs")
    tree = sealed["header"]
    if tree.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {tree.get('format')}, this version of megadit reads {FORMAT}; "
            f"go on with the version that wrote it, or start anew in another --run"
        )
    return Header(**tree)


def checked_header(path: Path) -> Header:
    """The header of a checkpoint of which every file is there and has its size.

    Raises DamageError, and CheckpointError where it may well be whole, but not for this version.
    """
    try:
        header = read_header(path)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise DamageError(f"{HEADER} cannot be read ({error})") from None
    for name, num_bytes in header.files.items():
        file = path / name
        if not file.is_file():
            raise DamageError(f"{name} is missing")
        if file.stat().st_size != num_bytes:
            raise DamageError(f"{name} has {file.stat().st_size} bytes instead of {num_bytes}")
    return header


def make_partial(partial: Path) -> None:
    """An empty folder to write into; what runs left that were killed while they wrote is removed."""
    for left_over in partial.parent.glob(f"{PARTIAL}*"):
        shutil.rmtree(left_over)
    partial.mkdir(parents=True)


def seal(partial: Path, header: Header) -> None:
    """Write the header, last, and publish."""
    content = json.dumps({"crc32": _crc32_of_tree(asdict(header)), "header": asdict(header)})
    write_synced(partial / HEADER, content.encode())
    publish(partial)


def write_synced(path: Path, content: bytes) -> None:
    """A new file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def publish(partial: Path) -> Path:
    """Give a folder of complete, synced files its final name, in which it is whole even after a power cut.

    Replaces a damaged one of the same moment, which a resume went back before.
    """
    final = partial.with_name(partial.name.removeprefix(PARTIAL))
    sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(final.parent)
    return final


def superfluous(paths: Sequence[Path], written: str, keep: int, keep_every_images: int | None) -> list[Path]:
    """All checkpoints but the newest `keep` and the first of every interval of `keep_every_images` images.

    `written` is the name of the one that was just written. Newer ones are damaged, or the run would have gone on from
    them: they neither count nor go, until the run is there and writes them anew.
    """
    old = [path for path in paths if path.name <= written]
    kept = {*sorted(old, reverse=True)[:keep], *_first_of_intervals(old, keep_every_images)}
    return [path for path in old if path not in kept]


def prune(folder: Path, written: str, keep: int, keep_every_images: int | None) -> None:
    """Remove the superfluous checkpoints of a folder; those that lack files do not count, and stay."""
    paths = [path for path in newest_first(folder) if _is_complete(path)]
    for path in superfluous(paths, written, keep, keep_every_images):
        doomed = path.with_name(f"{PARTIAL}{path.name}")  # at once; a kill would leave half of it otherwise
        path.rename(doomed)
        shutil.rmtree(doomed)


def _is_complete(path: Path) -> bool:
    try:
        checked_header(path)
    except CheckpointError:
        return False
    return True


def _first_of_intervals(paths: Iterable[Path], images: int | None) -> list[Path]:
    """The oldest path of each interval [n * images, (n + 1) * images), n > 0.

    Not those at multiples: where the batch size does not divide the interval, no step ends at one.
    """
    if images is None:
        return []
    first = {images_seen(path) // images: path for path in sorted(paths, reverse=True)}
    return [path for number, path in first.items() if number > 0]


def _crc32_of_tree(tree: Any) -> int:
    return checksums.crc32(json.dumps(tree).encode())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
