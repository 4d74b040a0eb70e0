"""Ranges of S3 objects read by obstore (Rust's object_store), which takes less processor time a byte than boto3.

An optional package. It only reads: everything else stays boto3's, and so does what obstore gives up on, since boto3's
reads have more patience and say what is wrong.
"""

import mmap

import boto3

from megadit.data.storage.store import S3Store, StorageError, log

try:
    import obstore
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.exceptions import BaseError
    from obstore.store import S3Store as RustStore
except ImportError as error:
    raise StorageError("data.client obstore: the package is not installed; pip install obstore") from error


class ObstoreStore(S3Store):
    """A prefix of an S3 bucket whose ranges are read by obstore; endpoint and credentials are those of boto3."""

    def __init__(self, bucket: str, prefix: str = "", retry_seconds: float | None = None) -> None:
        super().__init__(bucket, prefix, retry_seconds)
        endpoint, region = self._client.meta.endpoint_url, self._client.meta.region_name
        self._rust = RustStore(
            bucket,
            endpoint=endpoint,
            region=region,
            virtual_hosted_style_request=False,
            client_options={"allow_http": endpoint.startswith("http://")},
            retry_config={"max_retries": 2},
            credential_provider=Boto3CredentialProvider(boto3.session.Session()),
        )

    def get(self, name: str, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        data = None if end is None or start == end else self._range(name, start, end, etag)
        return super().get(name, start, end, etag) if data is None else bytes(data)

    def copy(self, name: str, start: int, end: int, target: mmap.mmap, etag: str | None = None) -> None:
        data = self._range(name, start, end, etag)
        if data is None:
            super().copy(name, start, end, target, etag)
        else:
            target.write(data)

    def _range(self, name: str, start: int, end: int, etag: str | None) -> memoryview | None:
        """Bytes [start, end) of an object; None where boto3 shall have a try."""
        options = {"range": (start, end)} | ({"if_match": etag} if etag else {})
        try:
            data = memoryview(obstore.get(self._rust, self._key(name), options=options).bytes())
        except BaseError as error:
            log.warning("%s: obstore gives up (%s); boto3 goes on", self.url(name), str(error).partition("\n")[0])
            return None
        return data if len(data) == end - start else None
