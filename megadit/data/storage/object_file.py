"""An object of a store as a file to read from: windows of 8 MB by Range GET, of which two are held."""

import io
from collections.abc import Callable, Iterator
from typing import Any

from megadit.data.storage import MissingError, Store, open_store

WINDOW_BYTES = 8 << 20


class ObjectFile(io.RawIOBase):
    """Reads the object `name` from wherever it is asked to, in memory of two windows.

    on_window gets each window once, in order, also those that nobody reads: what a digest of the whole object needs.
    Every read is of the content with the ETag `etag`; without, of that which is there now. Raises StorageError, when it
    is made and from every read; ChangedError where the content is another one.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        on_window: Callable[[bytes], object] | None = None,
        etag: str | None = None,
    ) -> None:
        super().__init__()
        self.etag = etag or store.etag(name)
        size = store.size(name)
        if size is None:
            raise MissingError(f"{store.url(name)} does not exist")
        self.size, self.url = size, store.url(name)
        self._store, self._object, self._on_window = store, name, on_window
        self._windows: dict[int, bytes] = {}
        self._seen, self._position = 0, 0  # windows that on_window had; the next byte to read

    def blocks(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes [start, end), as parts of windows; fewer where the object ends before."""
        end = min(end, self.size)
        while start < end:
            number, offset = divmod(start, WINDOW_BYTES)
            block = memoryview(self._window(number))[offset : offset + end - start]
            yield block
            start += len(block)

    def finish(self) -> None:
        """Give on_window what it did not have yet."""
        if self.size:
            self._window((self.size - 1) // WINDOW_BYTES)

    def read(self, size: int | None = -1) -> bytes:
        end = self.size if size is None or size < 0 else self._position + size
        data = b"".join(self.blocks(self._position, end))
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _window(self, number: int) -> bytes:
        if self._on_window:
            while self._seen < number:
                self._load(self._seen)
        return self._windows[number] if number in self._windows else self._load(number)

    def _load(self, number: int) -> bytes:
        start = number * WINDOW_BYTES
        data = self._store.get(self._object, start, min(start + WINDOW_BYTES, self.size), self.etag)
        if self._on_window and number == self._seen:
            self._seen += 1
            self._on_window(data)
        while len(self._windows) > 1:
            self._windows.pop(next(iter(self._windows)))
        self._windows[number] = data
        return data


def open_object(url: str) -> ObjectFile:
    """The object or file at `url`. Raises StorageError."""
    folder, slash, name = url.rpartition("/")
    return ObjectFile(open_store(folder or slash or "."), name)
