"""What is in a tar: where each member of each sample lies, with its CRC-32. Reads it once, from start to end.

ustar, GNU long names and pax are tarfile's work; the rest is what tarfile lets pass. A key is the name without folders
up to its first dot, as in WebDataset, and members of one key need not be neighbours.
"""

import io
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

import numpy as np
from PIL import Image

from megadit import checksums
from megadit.data.format.index import PLACE
from megadit.data.storage.object_file import ObjectFile

log = logging.getLogger(__name__)

PICTURES = ("jpg", "jpeg", "png", "webp")
GZIP_MAGIC = b"\x1f\x8b"
HEADER_BYTES = 256 << 10  # of a picture: its size is written within them, behind what a camera adds
LONGEST_SIDE = np.iinfo(np.uint16).max


class TarError(ValueError):
    """A tar that cannot be indexed, and at which byte. One line."""


@dataclass(frozen=True)
class TarContent:
    """The N samples of one tar that have every member asked for, in the order of their pictures.

    keys: bytes [N]; places: kind -> PLACE [N]; sizes: uint16 [N, 2], height and width; left_out: samples by what they
    lack; others: members that are of no sample, by what follows their first dot.
    """

    keys: np.ndarray
    places: dict[str, np.ndarray]
    sizes: np.ndarray
    left_out: dict[str, int]
    others: dict[str, int]


@dataclass
class _Sample:
    names: dict[str, str] = field(default_factory=dict)
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    size: tuple[int, int] | None = None  # height, width


def scan(file: ObjectFile, members: Sequence[str]) -> TarContent:
    """Index a tar; `members` are the kinds that a sample must have, the first of them its picture.

    Raises TarError for one that is compressed, cut short, broken, or has two members of one key and kind, and
    StorageError.
    """
    samples: dict[str, _Sample] = {}
    others: Counter[str] = Counter()
    if file.read(2) == GZIP_MAGIC:
        raise TarError(
            f"{file.url} is compressed by gzip, and no range of it can be read by itself; "
            "--gunzip-to s3://bucket/prefix or a folder writes it there as it is inside, and indexes that"
        )
    file.seek(0)
    for info in read_members(cast(IO[bytes], file), file.url):
        key, kind = split_name(info.name)
        if info.isdir():
            continue
        try:
            key.encode()
        except UnicodeEncodeError:
            raise TarError(f"{file.url}: the name {info.name!r} is not UTF-8") from None
        if not key or kind not in members or not info.isreg() or info.issparse():
            others[kind] += 1
            continue
        sample = samples.setdefault(key, _Sample())
        if kind in sample.names:
            raise TarError(f"{file.url}: the key {key!r} occurs twice: {sample.names[kind]!r} and {info.name!r}")
        sample.names[kind] = info.name
        sample.places[kind] = (info.offset_data, info.size, _crc32(file, info))
        if kind == members[0]:
            sample.size = _picture_size(file, info)
    return _to_content(samples, members, others)


def read_members(file: IO[bytes], url: str) -> Iterator[tarfile.TarInfo]:
    """The members of a plain tar, forwards, then a check that it was all of it. Raises TarError.

    tarfile takes a broken header for the end, and an end without its mark for an end.
    """
    try:
        tar: Any = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 (the file is the caller's)
    except tarfile.ReadError as error:
        raise TarError(f"{url} is not a tar file: {error}") from error
    while True:
        try:
            info = tar.next()
        except tarfile.ReadError as error:
            what = "broken" if file.read(1) else "cut short"
            raise TarError(f"{url} is {what}: at byte {tar.offset} there should be a member or the end") from error
        if info is None:
            break
        tar.members.clear()  # it would keep them all
        yield info
    end = tar.offset
    file.seek(end)
    mark = file.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE:
        raise TarError(f"{url} is cut short: it ends at byte {end + len(mark)}, without the mark of a tar's end")
    if any(mark):
        raise TarError(f"{url} is broken: at byte {end} there should be the header of a member")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise TarError(f"{url} goes on behind its end at byte {end}: it is several tars in one file")


def split_name(name: str) -> tuple[str, str]:
    """Key and kind of "./folder/sa_1.latent.npy": ("sa_1", "latent.npy")."""
    key, _, kind = name.rpartition("/")[2].partition(".")
    return key, kind.lower()


def _crc32(file: ObjectFile, info: tarfile.TarInfo) -> int:
    end = info.offset_data + info.size
    if end > file.size:
        raise TarError(f"{file.url} is cut short: it ends at byte {file.size}, and {info.name!r} at byte {end}")
    crc32 = 0
    for block in file.blocks(info.offset_data, end):
        crc32 = checksums.crc32(block, crc32)
    return crc32


def _picture_size(file: ObjectFile, info: tarfile.TarInfo) -> tuple[int, int] | None:
    """Height and width, None for what is no picture or has a side that the index cannot hold."""
    header = b"".join(file.blocks(info.offset_data, info.offset_data + min(info.size, HEADER_BYTES)))
    try:
        with Image.open(io.BytesIO(header)) as picture:
            width, height = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        log.warning("%s: %r is left out: %s", file.url, info.name, error)
        return None
    return (height, width) if max(height, width) <= LONGEST_SIDE else None


def _to_content(samples: dict[str, _Sample], members: Sequence[str], others: Counter[str]) -> TarContent:
    left_out: Counter[str] = Counter()
    kept: list[tuple[str, _Sample]] = []
    for key, sample in samples.items():
        missing = [kind for kind in members if kind not in sample.places]
        if missing:
            left_out[f"no {missing[0]}"] += 1
        elif sample.size is None:
            left_out["unreadable picture"] += 1
        else:
            kept.append((key, sample))
    kept.sort(key=lambda item: item[1].places[members[0]])
    return TarContent(
        keys=np.array([key.encode() for key, _ in kept], dtype=np.bytes_),
        places={kind: np.array([sample.places[kind] for _, sample in kept], dtype=PLACE) for kind in members},
        sizes=np.array([sample.size for _, sample in kept], dtype=np.uint16).reshape(-1, 2),
        left_out=dict(left_out),
        others=dict(others),
    )
