"""Objects in S3 or in folders, read by ranges and written whole; their copies on this machine; a local S3 server."""

from megadit.data.storage.store import (
    ChangedError,
    Client,
    FileStore,
    MissingError,
    S3Store,
    StorageError,
    Store,
    open_store,
)

__all__ = [
    "ChangedError",
    "Client",
    "FileStore",
    "MissingError",
    "S3Store",
    "StorageError",
    "Store",
    "open_store",
]
