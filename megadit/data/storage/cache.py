"""Ranges of shards kept on a local disk, within a limit, shared by the processes of a node.

A file is named by the shard's identity and the range, written under another name and renamed, and thrown away when it
is the least recently used. Nothing is verified here: members carry their CRC-32, and the reader asks S3 for a range
whose copy does not pass.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
from pathlib import Path

from megadit.data.storage import StorageError
from megadit.files import writing

log = logging.getLogger(__name__)

# A process looks at the whole folder after writing this share of the limit, and goes back below it by as much; so the
# folder exceeds the limit by at most this share for each process that writes.
SLACK_SHARE = 1 / 64


class ChunkCache:
    """A folder of ranges of at most `limit_bytes`. Methods may be called from several threads and processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._written = limit_bytes  # what others left is looked at before the first write

    def get(self, shard: str, start: int, end: int) -> bytes | None:
        """Bytes [start, end) of the shard with the identity `shard`; None where there is no copy of that length."""
        path = self._path(shard, start, end)
        try:
            data = path.read_bytes()
            os.utime(path)  # used now
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._explained(error) from error
        return data if len(data) == end - start else None

    def put(self, shard: str, start: int, data: bytes | memoryview) -> None:
        """Keep bytes of the shard from `start` on, in place of an older copy. Raises StorageError."""
        path = self._path(shard, start, start + len(data))
        try:
            self._written += len(data)
            if self._written > self._limit * SLACK_SHARE:
                self._written = len(data)
                self._make_room()
            with writing(path, shared=True, synced=False) as file:
                file.write(data)
        except OSError as error:
            raise self._explained(error) from error

    def _make_room(self) -> None:
        """Throw the least recently used away, one process at a time; what another one throws away is gone, too."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for path in self._folder.glob("??/*"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self._limit * (1 - SLACK_SHARE):
                    return
                path.unlink(missing_ok=True)
                total -= size

    def _path(self, shard: str, start: int, end: int) -> Path:
        name = hashlib.sha256(f"{shard}\0{start}\0{end}".encode()).hexdigest()
        return self._folder / name[:2] / name

    def _explained(self, error: OSError) -> StorageError:
        return StorageError(f"data.cache_folder {self._folder}: {error}; give another folder, or lower data.cache_gb")
