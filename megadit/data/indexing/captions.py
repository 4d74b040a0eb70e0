"""Captions from a side table, joined to the samples of an indexed data set by key.

Tables: a tar or tar.gz of <key>.txt files (SAM-LLaVA-Captions10M), .jsonl or .jsonl.gz (one object a line), .parquet. A
key is a name without folders, up to its first dot. The 11 million captions of SA-1B are 8 GB of text, more than a
machine may have: they are dealt, as they come, to temporary files of neighbouring samples, and each of these is put in
order by itself. So a join takes two passes over the text, memory for a 64th of it, and disk space in TMPDIR for all.
"""

import gzip
import importlib
import io
import itertools
import json
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from megadit import checksums
from megadit.data.bars import Advance, Bars, no_bars
from megadit.data.format.index import PLACE
from megadit.data.indexing.tars import TarError, read_members, split_name
from megadit.data.storage import StorageError, Store
from megadit.data.storage.object_file import ObjectFile, open_object

KEY_FIELDS = ("key", "image", "file_name", "id")
CAPTION_FIELDS = ("caption", "text")
NUM_SPOOLS = 64
BATCH = 4096
RECORD = struct.Struct("<QI")  # sample, bytes of its caption, which follow

Row = tuple[int, str, bytes]  # number of the line, row or file; key; caption


class CaptionError(ValueError):
    """A table that cannot be joined, and where. One line."""


@dataclass(frozen=True)
class CaptionTable:
    """The table at `url` (s3://..., file:///... or a path); its fields are found by name unless they are given."""

    url: str
    key_field: str | None = None
    caption_field: str | None = None

    def identity(self) -> list[str | None]:
        """What changes when the captions do. Raises StorageError."""
        return [self.url, open_object(self.url).etag, self.key_field, self.caption_field]

    def rows(self) -> tuple[str, Iterator[Row], ObjectFile]:
        """What a number counts (file, line, row), the rows, and the file that they are read from.

        Raises CaptionError and StorageError.
        """
        file = open_object(self.url)
        name = file.url.lower()
        if name.endswith((".tar", ".tar.gz", ".tgz")):
            return "file", _explained(file.url, _tar_rows(_inside(file), file.url)), file
        if name.endswith((".jsonl", ".jsonl.gz")):
            return "line", _explained(file.url, self._json_rows(_inside(file), file.url)), file
        if name.endswith(".parquet"):
            return "row", self._parquet_rows(file), file
        raise CaptionError(f"{file.url}: a table of captions is .tar, .tar.gz, .jsonl, .jsonl.gz or .parquet")

    def _json_rows(self, file: BinaryIO, url: str) -> Iterator[Row]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record: Any = json.loads(line)
            except ValueError as error:
                raise CaptionError(f"{url} line {number}: not JSON, or not UTF-8: {error}") from None
            if not isinstance(record, dict):
                raise CaptionError(f"{url} line {number}: a line is an object")
            where = f"{url} line {number}"
            key = record[self._key_field(record, where)]
            caption = record[self._caption_field(record, where)]
            yield number, _check_key(key, where), _encode(caption, where)

    def _parquet_rows(self, file: ObjectFile) -> Iterator[Row]:
        try:
            pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise CaptionError(f"{file.url}: a .parquet table needs pyarrow: pip install pyarrow") from None
        try:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            columns = [self._key_field(names, file.url), self._caption_field(names, file.url)]
            numbers = itertools.count(1)
            for batch in table.iter_batches(BATCH, columns=columns):
                for key, caption in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    number = next(numbers)
                    where = f"{file.url} row {number}"
                    yield number, _check_key(key, where), _encode(caption, where)
        except pyarrow.ArrowException as error:
            raise CaptionError(f"{file.url}: {' '.join(str(error).split())}") from error

    def _key_field(self, names: Any, where: str) -> str:
        return _choose(self.key_field, KEY_FIELDS, names, where, "--caption-key-field")

    def _caption_field(self, names: Any, where: str) -> str:
        return _choose(self.caption_field, CAPTION_FIELDS, names, where, "--caption-field")


@dataclass(frozen=True)
class Joined:
    """Captions of the N samples: found bool [N], places PLACE [N] in `files`, of which each tar has one.

    left_out: samples by reason; unknown: captions whose key no sample has.
    """

    found: np.ndarray
    places: np.ndarray
    files: Sequence[str]
    left_out: Counter[str]
    unknown: int


def join(
    table: CaptionTable,
    keys: np.ndarray,
    order: np.ndarray,
    counts: np.ndarray,
    files: Sequence[str],
    store: Store,
    bars: Bars = no_bars,
) -> Joined:
    """Write the captions of each tar's samples to its file, one after the other in their order.

    keys: bytes [N], those of each tar (`counts` of them) one after the other; order: int64 [N], their argsort.
    A sample whose caption is missing or empty is left out. Raises CaptionError when a key has two captions, when one is
    not UTF-8, or when none has the key of a sample; StorageError.
    """
    first_rows = np.zeros(len(keys), dtype=np.int64)  # 0: no caption yet
    places = np.zeros(len(keys), dtype=PLACE)
    ends = np.cumsum(counts)
    num_spools = min(NUM_SPOOLS, len(files))
    tar_spools = (np.arange(len(files)) * num_spools // len(files)).astype(np.uint8)
    with tempfile.TemporaryDirectory(prefix="megadit-captions-") as folder:
        spools = [Path(folder) / str(number) for number in range(num_spools)]
        with bars("reading captions") as advance:
            spool_of = tar_spools.repeat(counts)
            unknown = _deal(table, keys, order, first_rows, spool_of, spools, advance)
        with bars("writing captions") as advance:
            for number, spool in enumerate(spools):
                texts = _read_spool(spool)
                for tar in np.flatnonzero(tar_spools == number).tolist():
                    samples = np.arange(ends[tar] - counts[tar], ends[tar])
                    _write_captions(texts, samples, places, files[tar], store)
                advance(number + 1, num_spools)
    found = places["size"] > 0
    if not found.any():
        raise CaptionError(
            f"{table.url}: none of its {unknown} keys is that of a sample; a sample is called {keys[0].decode()!r}"
        )
    left_out = {"no caption": int((first_rows == 0).sum()), "empty caption": int((first_rows > 0).sum() - found.sum())}
    return Joined(found, places, files, Counter({reason: n for reason, n in left_out.items() if n}), unknown)


def _deal(
    table: CaptionTable,
    keys: np.ndarray,
    order: np.ndarray,
    first_rows: np.ndarray,
    spool_of: np.ndarray,
    spools: Sequence[Path],
    advance: Advance,
) -> int:
    """Write each caption to the spool of its sample; the number of those whose key no sample has."""
    unit, rows, file_of_rows = table.rows()
    ordered, unknown = keys[order], 0
    try:
        files = [spool.open("wb", buffering=1 << 18) for spool in spools]
        try:
            while batch := list(itertools.islice(rows, BATCH)):
                wanted = np.array([key.encode() for _, key, _ in batch], dtype=np.bytes_)
                at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
                known = ordered[at] == wanted
                samples = order[at]
                unknown += int((~known).sum())
                for place, spool in zip(np.flatnonzero(known), spool_of[samples[known]], strict=True):
                    (number, key, caption), sample = batch[place], samples[place]
                    if first_rows[sample]:
                        raise CaptionError(
                            f"{table.url}: the key {key!r} occurs twice, in {unit} {first_rows[sample]} and {number}"
                        )
                    first_rows[sample] = number
                    files[spool].write(RECORD.pack(sample, len(caption)) + caption)
                advance(file_of_rows.tell(), file_of_rows.size)
        finally:
            for file in files:
                file.close()
    except OSError as error:
        raise StorageError(
            f"cannot keep captions in {spools[0].parent}: {error.strerror}; set TMPDIR to a folder with room for all"
        ) from error
    return unknown


def _write_captions(texts: dict[int, bytes], samples: np.ndarray, places: np.ndarray, file: str, store: Store) -> None:
    """Write those of `samples`, int64 [N], to `file`, and where they lie to `places`."""
    chosen = samples[[bool(texts.get(sample)) for sample in samples.tolist()]]
    captions = [texts[sample] for sample in chosen.tolist()]
    sizes = np.array([len(caption) for caption in captions], dtype=np.int64)
    places["offset"][chosen] = np.cumsum(sizes) - sizes
    places["size"][chosen] = sizes
    places["crc32"][chosen] = [checksums.crc32(caption) for caption in captions]
    if captions:
        store.put(file, b"".join(captions))


def _read_spool(path: Path) -> dict[int, bytes]:
    data, texts, position = path.read_bytes(), {}, 0
    while position < len(data):
        sample, size = RECORD.unpack_from(data, position)
        position += RECORD.size + size
        texts[sample] = data[position - size : position]
    return texts


def _tar_rows(file: BinaryIO, url: str) -> Iterator[Row]:
    numbers = itertools.count(1)
    for info in read_members(file, url):
        key, kind = split_name(info.name)
        if key and kind == "txt" and info.isreg():
            file.seek(info.offset_data)
            yield next(numbers), key, _encode(file.read(info.size), f"{url}: {info.name}")


def _inside(file: ObjectFile) -> BinaryIO:
    """The content of a file that may be compressed, buffered."""
    compressed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=cast(BinaryIO, file)) if compressed else io.BufferedReader(file))


def _explained(url: str, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CaptionError(f"{url} is cut short or damaged: {error}") from error
    except TarError as error:
        raise CaptionError(str(error)) from error


def _check_key(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not (key := split_name(str(value))[0]):
        raise CaptionError(f"{where}: {value!r} is not a key: a name of a file, or a number")
    return key


def _encode(caption: object, where: str) -> bytes:
    """UTF-8 without blanks at the ends."""
    try:
        text = caption.decode() if isinstance(caption, bytes) else caption
        if not isinstance(text, str):
            raise CaptionError(f"{where}: {caption!r} is not a caption: a text")
        return text.strip().encode()
    except UnicodeError:
        raise CaptionError(f"{where}: the caption is not UTF-8") from None


def _choose(given: str | None, usual: Sequence[str], names: Any, where: str, option: str) -> str:
    for name in (given,) if given else usual:
        if name in names:
            return name
    raise CaptionError(
        f"{where}: there is no field {given or ' or '.join(usual)}; it has {', '.join(names)} ({option})"
    )
