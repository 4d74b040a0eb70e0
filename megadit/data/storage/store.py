"""One small interface over S3 and local folders: read ranges, write whole objects, never half of one.

Names are relative to the root. boto3's body reader does not resume (boto3#2662, botocore#3132), so reads continue here:
after a break the rest is asked for with `If-Match`, and the time without progress is bounded by RETRY_SECONDS, or by
what the caller says.
"""

import contextlib
import errno
import functools
import io
import logging
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import boto3
import botocore.loaders
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError as NoConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)

from megadit.files import writing

log = logging.getLogger(__name__)
T = TypeVar("T")

# All limits of patience, in one place. A server that is down is reported within about 20 s; a run in the middle of its
# data has more patience (loading/loader.py), since what it would lose is worth more.
RETRY_SECONDS = 17.0
FIRST_DELAY, LONGEST_DELAY = 0.1, 2.0
CONNECT_TIMEOUT, READ_TIMEOUT = 3.0, 8.0

BLOCK_BYTES = 1 << 20
PART_BYTES = 64 << 20  # of a multipart upload, which has at most 10,000
TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests"}
KEY_VARIABLES = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
KEY_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}


class StorageError(ValueError):
    """What cannot be read or written, where, and why. One line."""


class MissingError(StorageError):
    """The object, the folder or the bucket does not exist."""


class ChangedError(StorageError):
    """The object is not the one whose ETag was asked for."""


class Store(Protocol):
    """A folder of objects."""

    def url(self, name: str = "") -> str:
        """The full address of `name`, for messages."""

    def get(self, name: str, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """Bytes [start, end) of an object; to its end without `end`.

        Raises StorageError; ChangedError where the object's ETag is not `etag`.
        """

    def copy(self, name: str, start: int, end: int, target: mmap.mmap, etag: str | None = None) -> None:
        """Fill `target`, which is at its start, with bytes [start, end) of an object. Raises like `get`."""

    def put(self, name: str, data: bytes) -> None:
        """Write a whole object; readers see the old one, or all of the new one. Raises StorageError."""

    def put_stream(self, name: str, source: IO[bytes]) -> None:
        """Write a whole object, of any size, as it is read from `source`. Raises StorageError."""

    def size(self, name: str) -> int | None:
        """Bytes of an object; None when there is none. Raises StorageError."""

    def etag(self, name: str) -> str | None:
        """What changes when the object does: its ETag, or size and time of a file; None when there is none."""

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens when there is none. Raises StorageError."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Names of the objects that start with `prefix`, sorted. Raises StorageError."""

    def close(self) -> None:
        """Give up on what is being retried in other threads: nobody waits for it any more."""


class FileStore:
    """A folder of the file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def url(self, name: str = "") -> str:
        return (self.root / name).as_uri()

    def get(self, name: str, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        with self._explained("read", name), self._open(name, start, etag) as file:
            data = file.read() if end is None else file.read(end - start)
        if end is not None and len(data) != end - start:
            raise StorageError(_too_short(self.url(name), start + len(data), end))
        return data

    def copy(self, name: str, start: int, end: int, target: mmap.mmap, etag: str | None = None) -> None:
        with self._explained("read", name), self._open(name, start, etag) as file:
            num_bytes = file.readinto(target)
        if num_bytes != end - start:
            raise StorageError(_too_short(self.url(name), start + num_bytes, end))

    def put(self, name: str, data: bytes) -> None:
        self.put_stream(name, io.BytesIO(data))

    def put_stream(self, name: str, source: IO[bytes]) -> None:
        path = self.root / name
        with self._explained("write", name):
            with writing(path, shared=True) as file:
                shutil.copyfileobj(source, file, BLOCK_BYTES)
            folder = os.open(path.parent, os.O_RDONLY)  # makes the new name itself durable
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def size(self, name: str) -> int | None:
        status = self._status(name)
        return None if status is None else status.st_size

    def etag(self, name: str) -> str | None:
        status = self._status(name)
        return None if status is None else _file_etag(status)

    def delete(self, name: str) -> None:
        with self._explained("remove", name):
            (self.root / name).unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[str]:
        names = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        yield from sorted(name for name in names if name.startswith(prefix))

    def close(self) -> None:
        pass  # nothing is retried

    def _open(self, name: str, start: int, etag: str | None) -> io.BufferedReader:
        file = (self.root / name).open("rb")
        if etag is not None and _file_etag(os.fstat(file.fileno())) != etag:
            file.close()
            raise ChangedError(_changed(self.url(name)))
        file.seek(start)
        return file

    def _status(self, name: str) -> os.stat_result | None:
        try:
            with self._explained("read", name):
                return (self.root / name).stat()
        except MissingError:
            return None

    @contextlib.contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise MissingError(f"{self.url(name)} does not exist") from None
        except OSError as error:
            reason = "no space left on the device" if error.errno == errno.ENOSPC else (error.strerror or str(error))
            raise StorageError(f"cannot {verb} {self.url(name)}: {reason}") from error


class S3Store:
    """A prefix of an S3 bucket."""

    def __init__(self, bucket: str, prefix: str = "", retry_seconds: float | None = None) -> None:
        if not bucket:
            raise StorageError("an S3 address needs a bucket: s3://bucket/prefix")
        self.bucket, self.prefix = bucket, prefix
        self._retry_seconds = RETRY_SECONDS if retry_seconds is None else retry_seconds
        self._closed = threading.Event()
        config = Config(
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            retries={"total_max_attempts": 1, "mode": "standard"},  # the loop is ours
            max_pool_connections=32,
            # Members carry their own CRC; the newer trailing checksums are unknown to many S3 servers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            session = botocore.session.get_session()
            session.register_component("data_loader", _service_models())
            self._client: Any = boto3.session.Session(botocore_session=session).client("s3", config=config)
        except (ValueError, BotoCoreError) as error:
            raise StorageError(f"{self.url()}: S3 is not set up: {error}") from error

    def url(self, name: str = "") -> str:
        return f"s3://{self.bucket}/{self._key(name)}"

    def get(self, name: str, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        buffer = io.BytesIO()
        if end is None or start < end:
            self._copy(name, start, end, buffer, etag)
        return buffer.getvalue()

    def copy(self, name: str, start: int, end: int, target: mmap.mmap, etag: str | None = None) -> None:
        self._copy(name, start, end, target, etag)

    def _copy(self, name: str, start: int, end: int | None, target: io.BytesIO | mmap.mmap, etag: str | None) -> None:
        request = {"Bucket": self.bucket, "Key": self._key(name)} | ({"IfMatch": etag} if etag else {})

        def read_on() -> None:
            if start or end is not None or target.tell():
                request["Range"] = f"bytes={start + target.tell()}-{'' if end is None else end - 1}"
            response = self._client.get_object(**request)
            if "Range" in request and "ContentRange" not in response:
                raise StorageError(f"{self.url(name)}: the server ignores Range requests (status 200, not 206)")
            request["IfMatch"] = response["ETag"]  # what follows must come from the same object
            for block in response["Body"].iter_chunks(BLOCK_BYTES):
                target.write(block)

        self._patiently(name, read_on, progress=target.tell)
        if end is not None and target.tell() != end - start:
            raise StorageError(_too_short(self.url(name), start + target.tell(), end))

    def put(self, name: str, data: bytes) -> None:
        self._patiently(name, lambda: self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data))

    def put_stream(self, name: str, source: IO[bytes]) -> None:
        """A multipart upload: the object is there once the last part is."""
        target = {"Bucket": self.bucket, "Key": self._key(name)}
        upload = target | {
            "UploadId": self._patiently(name, lambda: self._client.create_multipart_upload(**target))["UploadId"]
        }
        parts: list[dict[str, Any]] = []
        try:
            while (data := source.read(PART_BYTES)) or not parts:
                part = upload | {"PartNumber": len(parts) + 1, "Body": data}
                answer = self._patiently(name, functools.partial(self._client.upload_part, **part))
                parts.append({"PartNumber": part["PartNumber"], "ETag": answer["ETag"]})
            done = upload | {"MultipartUpload": {"Parts": parts}}
            self._patiently(name, lambda: self._client.complete_multipart_upload(**done))
        except BaseException:
            with contextlib.suppress(StorageError):  # the first error is the one to tell
                self._patiently(name, lambda: self._client.abort_multipart_upload(**upload))
            raise

    def size(self, name: str) -> int | None:
        head = self._head(name)
        return None if head is None else head["ContentLength"]

    def etag(self, name: str) -> str | None:
        head = self._head(name)
        return None if head is None else head["ETag"]

    def delete(self, name: str) -> None:
        self._patiently(name, lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(name)))

    def list(self, prefix: str = "") -> Iterator[str]:
        root = f"{self.prefix}/" if self.prefix else ""
        request = {"Bucket": self.bucket, "Prefix": root + prefix}
        while True:
            page = self._patiently(prefix, lambda: self._client.list_objects_v2(**request))
            yield from (entry["Key"].removeprefix(root) for entry in page.get("Contents", ()))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def close(self) -> None:
        self._closed.set()

    def _head(self, name: str) -> dict[str, Any] | None:
        try:
            return self._patiently(name, lambda: self._client.head_object(Bucket=self.bucket, Key=self._key(name)))
        except MissingError:
            # The answer to HEAD has no body that would tell a missing object from a missing bucket.
            self._patiently("", lambda: self._client.head_bucket(Bucket=self.bucket))
            return None

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix and name else self.prefix or name

    def _patiently(self, name: str, action: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Run `action` until it succeeds; gives up after the retry seconds without progress."""
        started, attempts, delay, reached = time.monotonic(), 0, FIRST_DELAY, progress()
        while True:
            try:
                return action()
            except (ClientError, BotoCoreError) as error:
                if not _is_transient(error):
                    raise self._explain(name, error) from error
                if progress() > reached:
                    started, attempts, delay, reached = time.monotonic(), 0, FIRST_DELAY, progress()
                attempts += 1
                elapsed = time.monotonic() - started
                if elapsed + delay > self._retry_seconds or self._closed.is_set():
                    raise StorageError(
                        f"{self.url(name)}: S3 at {self._client.meta.endpoint_url} does not answer "
                        f"after {attempts} tries in {elapsed:.0f} s: {_one_line(error)}"
                    ) from error
                log.warning("%s: %s; trying again in %.1f s", self.url(name), _one_line(error), delay)
                self._closed.wait(delay)
                delay = min(2 * delay, LONGEST_DELAY)

    def _explain(self, name: str, error: ClientError | BotoCoreError) -> StorageError:
        url, endpoint = self.url(name), self._client.meta.endpoint_url
        if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)):
            return StorageError(f"{url}: no S3 credentials ({_one_line(error)}); set {KEY_VARIABLES}, or a profile")
        if not isinstance(error, ClientError):
            return StorageError(f"{url}: {_one_line(error)}")
        code, status = _code(error), _status(error)
        if code == "NoSuchBucket":
            return MissingError(f"{url}: the bucket {self.bucket!r} does not exist at {endpoint}")
        if status == 404:
            what = f"the bucket {self.bucket!r}" if not name else "the object"
            return MissingError(f"{url}: {what} does not exist at {endpoint}")
        if code in KEY_CODES:
            return StorageError(f"{url}: S3 at {endpoint} rejects the credentials ({code}); check {KEY_VARIABLES}")
        if status == 403:
            # The answer to HEAD has no body, and so no code that would tell the two apart.
            what = "no permission, or wrong credentials," if code == "403" else f"no permission ({code})"
            return StorageError(f"{url}: {what} at {endpoint} (status 403); check {KEY_VARIABLES}")
        if status == 412:
            return ChangedError(_changed(url))
        if status == 416:
            return StorageError(f"{url} is shorter than the range that was asked for (status 416)")
        return StorageError(f"{url}: S3 at {endpoint} answers {status} {_one_line(error)}")


@functools.lru_cache(maxsize=1)
def _service_models() -> Any:
    """What botocore knows of S3: 0.1 s to read. Credentials and endpoint still are those of the moment."""
    return botocore.loaders.create_loader(os.environ.get("AWS_DATA_PATH"))


def _file_etag(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _too_short(url: str, reached: int, end: int) -> str:
    return f"{url} ends at byte {reached}, before byte {end} that was asked for"


def _changed(url: str) -> str:
    return f"{url} was changed since it was indexed or while it was being read: its ETag is another one"


def _is_transient(error: ClientError | BotoCoreError) -> bool:
    if isinstance(error, ClientError):
        status = _status(error)
        return status >= 500 or status in (408, 429) or _code(error) in TRANSIENT_CODES
    # No connection, reset, closed early, timed out. (A certificate that is not trusted is a NoConnectionError, too.)
    broken = (NoConnectionError, HTTPClientError, IncompleteReadError)
    return isinstance(error, broken) and not isinstance(error, SSLError)


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
