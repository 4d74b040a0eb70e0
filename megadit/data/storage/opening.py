"""From an address to a store.

`open_store("s3://bucket/prefix")` uses boto3 with its usual chain of credentials and endpoints (AWS_ENDPOINT_URL,
profiles, roles); `open_store("file:///folder")` or a plain path uses the file system.
"""

from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from megadit.data.storage.store import FileStore, S3Store, StorageError, Store

Client = Literal["boto3", "obstore"]


def open_store(url: str, client: Client = "boto3", retry_seconds: float | None = None) -> Store:
    """The store at `s3://bucket/prefix`, `file:///folder` or a plain path.

    client: who reads from S3; obstore is an optional package. retry_seconds: how long a server may give nothing,
    RETRY_SECONDS without. Raises StorageError.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3" and client == "obstore":
        from megadit.data.storage.obstore_store import ObstoreStore  # obstore need not be installed

        return ObstoreStore(parts.netloc, parts.path.strip("/"), retry_seconds)
    if parts.scheme == "s3":
        return S3Store(parts.netloc, parts.path.strip("/"), retry_seconds)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise StorageError(f"{url}: a file address has three slashes: file:///folder")
        return FileStore(Path(unquote(parts.path)))
    if "://" in url:
        raise StorageError(f"{url}: unknown scheme {parts.scheme!r}; use s3://bucket/prefix, file:///folder or a path")
    if not url:
        raise StorageError("an empty address; use s3://bucket/prefix, file:///folder or a path")
    return FileStore(Path(url).absolute())
