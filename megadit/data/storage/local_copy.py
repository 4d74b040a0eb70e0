"""Files of a data set as files of this machine: those in a folder as they are, those in S3 copied once.

Copies lie in $MEGADIT_CACHE, by default ~/.cache/megadit, under their sha256, so that data sets, runs and ranks share
them and a stale one is never taken.
"""

import hashlib
import os
from pathlib import Path

from megadit.checksums import sha256_of
from megadit.data.storage import FileStore, StorageError, Store
from megadit.files import writing


def local_copy(store: Store, name: str, sha256: str) -> Path:
    """A local file with the content of the object `name`, which must have that sha256. Raises StorageError."""
    if isinstance(store, FileStore):
        path = store.root / name
        store.size(name)  # says what is wrong with the path
        if not path.is_file():
            raise StorageError(f"{store.url(name)} does not exist")
        _check(sha256_of(path), sha256, store.url(name))
        return path
    path = cache_folder() / sha256[:2] / f"{sha256}-{Path(name).name}"
    if not path.exists():
        data = store.get(name)
        _check(hashlib.sha256(data).hexdigest(), sha256, store.url(name))
        _write(path, data)
    return path


def cache_folder() -> Path:
    """Where copies are kept. They may be deleted whenever no run uses them."""
    return Path(os.environ.get("MEGADIT_CACHE") or Path.home() / ".cache" / "megadit")


def _check(found: str, expected: str, where: str) -> None:
    if found != expected:
        raise StorageError(f"{where}: this file does not belong to the manifest beside it (sha256 differs)")


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: several ranks may write the same file."""
    try:
        with writing(path, shared=True) as file:
            file.write(data)
    except OSError as error:
        raise StorageError(f"cannot keep a copy at {path}: {error}; set MEGADIT_CACHE to another folder") from error
