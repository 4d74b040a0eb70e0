"""Compressed tars as plain ones, written elsewhere: a range of a compressed tar cannot be read by itself."""

import gzip
import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from megadit.data.indexing.tars import GZIP_MAGIC, TarError
from megadit.data.storage import Store
from megadit.data.storage.object_file import ObjectFile

SOURCE_SUFFIX = ".source"  # beside each written tar: the ETag of what it was written from


def gunzip(source: Store, name: str, target: Store, on_bytes: Callable[[int], object]) -> str:
    """Write the tar `name` of `source` to `target`, decompressed; its name there. One that is there is kept.

    on_bytes: is told of how many more bytes of the compressed one are done. Raises TarError for what is not compressed,
    cut short or damaged, and StorageError.
    """
    plain = name.removesuffix(".gz")
    plain = f"{plain.removesuffix('.tgz')}.tar" if plain.endswith(".tgz") else plain
    file = ObjectFile(source, name, lambda window: on_bytes(len(window)))
    etag = (file.etag or "").encode()
    written = all(target.size(file) is not None for file in (plain, plain + SOURCE_SUFFIX))
    if written and target.get(plain + SOURCE_SUFFIX) == etag:
        on_bytes(file.size)
        return plain
    if file.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
        raise TarError(f"{file.url} is not compressed; index compressed tars and plain ones by themselves")
    if source.url(name) == target.url(plain):
        raise TarError(f"{file.url} would be written over; give --gunzip-to another place")
    file.seek(0)
    target.put_stream(plain, cast(BinaryIO, io.BufferedReader(_Plain(file), 1 << 20)))
    target.put(plain + SOURCE_SUFFIX, etag)
    return plain


class _Plain(io.RawIOBase):
    """What is inside a gzip file; its faults are TarErrors, or the writer would take them for its own."""

    def __init__(self, file: ObjectFile) -> None:
        super().__init__()
        self._url, self._inside = file.url, gzip.GzipFile(fileobj=cast(BinaryIO, file))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inside.read(len(buffer))
        except EOFError as error:
            raise TarError(f"{self._url} is cut short: its compressed content has no end") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise TarError(f"{self._url} is damaged: {error}") from error
        buffer[: len(data)] = data
        return len(data)
