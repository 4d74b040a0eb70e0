"""The S3 server that the tests share."""

import itertools
from collections.abc import Iterator

import pytest

from megadit.data.local_s3 import LocalS3

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """A running S3 server; its `environment` is not set yet."""
    with LocalS3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_bucket(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new, empty bucket, with the environment set so that boto3 finds it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{next(_numbers)}"
    s3.create_bucket(bucket)
    return f"s3://{bucket}"
