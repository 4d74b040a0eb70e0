"""Objects in S3 or in folders, read by ranges and written whole; their copies on this machine; a local S3 server."""

from megadit.data.storage.opening import Client, open_store
from megadit.data.storage.store import ChangedError, FileStore, MissingError, S3Store, StorageError, Store

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
