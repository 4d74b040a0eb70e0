import logging
import os
import resource
from pathlib import Path

import boto3
import pytest

from megadit.data.storage import MissingError, StorageError, open_store, store as storage
from megadit.data.storage.local_s3 import LocalS3

CONTENT = bytes(os.urandom(300_000))


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        (tmp_path / "a folder").as_uri() if request.param == "file" else request.getfixturevalue("s3_bucket") + "/a/b"
    )


def test_write_and_read(root: str) -> None:
    store = open_store(root)
    for name in ("x/one", "x/two", "other"):
        store.put(name, CONTENT)
    store.put("other", b"")
    assert store.get("x/one") == CONTENT
    assert store.get("x/one", 10, 20) == CONTENT[10:20]
    assert store.get("x/one", 299_990) == CONTENT[-10:]
    assert store.get("x/one", 5, 5) == b""
    assert store.get("other") == b""
    assert store.size("x/one") == len(CONTENT)
    assert store.size("none") is None
    assert list(store.list()) == ["other", "x/one", "x/two"]
    assert list(store.list("x/o")) == ["x/one"]
    assert store.url("x/one") == f"{root}/x/one"
    for _ in range(2):  # nothing happens where there is nothing
        store.delete("x/one")
    assert list(store.list()) == ["other", "x/two"]


def test_missing_and_short_objects(root: str) -> None:
    store = open_store(root)
    store.put("short", b"12345")
    with pytest.raises(MissingError, match=r"/none.* does not exist"):
        store.get("none")
    with pytest.raises(StorageError, match=r"short ends at byte 5, before byte 8"):
        store.get("short", 3, 8)


def test_list_takes_more_than_one_page(s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}/many")
    names = [f"{number:04d}" for number in range(1003)]  # a page has 1000
    for name in names:
        store.put(name, b"")
    assert list(store.list()) == names


@pytest.mark.parametrize("url", ["http://host/x", "", "s3:///key", "file://host/x"])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(StorageError):
        open_store(url)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("name", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(StorageError, match=r"cannot write file:///.*name: File too large"):
            store.put("name", CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
    assert store.get("name") == b"old"


def test_objects_are_what_other_clients_see(s3: LocalS3, s3_bucket: str) -> None:
    open_store(f"{s3_bucket}/p").put("k", CONTENT)
    client = boto3.client("s3")
    assert client.get_object(Bucket=s3_bucket[5:], Key="p/k")["Body"].read() == CONTENT


def test_errors_that_no_retry_mends(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store("s3://no-such-bucket/x")
    for call in (lambda: store.get("k"), lambda: store.size("k")):
        with pytest.raises(MissingError, match=r"the bucket 'no-such-bucket' does not exist at http://127"):
            call()
    open_store(s3_bucket).put("k", CONTENT)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StorageError, match=r"rejects the credentials \(SignatureDoesNotMatch\)"):
            open_store(s3_bucket).get("k")
        with pytest.raises(StorageError, match=r"no permission, or wrong credentials, at http"):
            open_store(s3_bucket).size("k")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        with pytest.raises(StorageError, match=r"rejects the credentials \(InvalidAccessKeyId\)"):
            open_store(s3_bucket).put("k", b"")
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            patch.setenv(name, os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(StorageError, match="no S3 credentials"):
            open_store(s3_bucket).get("k")
    assert "trying again" not in caplog.text


def test_reads_continue_where_they_broke(
    s3: LocalS3, s3_bucket: str, breaking_proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_store(s3_bucket).put("k", CONTENT)
    proxy = breaking_proxy(s3.endpoint)
    proxy.cuts = [100_000, 60_000, 0, 0, 90_000, 0]  # 0: before a byte of the answer
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 10_000)
    assert open_store(s3_bucket).get("k", 1000) == CONTENT[1000:]
    assert proxy.broken == 6
    assert caplog.text.count("trying again") == 6


def test_an_object_that_changes_during_a_read(
    s3: LocalS3, s3_bucket: str, breaking_proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = open_store(s3_bucket)
    direct.put("k", CONTENT)
    proxy = breaking_proxy(s3.endpoint)
    proxy.cuts = [100_000]
    proxy.on_break = lambda: direct.put("k", CONTENT[::-1])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    with pytest.raises(StorageError, match="while it was being read"):
        open_store(s3_bucket).get("k")


def test_a_server_that_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 2.0)
    with LocalS3(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.create_bucket("bucket")
        store = open_store("s3://bucket/x")
        store.put("k", CONTENT)
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError) as caught:
        store.get("k")
    assert f"s3://bucket/x/k: S3 at {server.endpoint} does not answer after" in str(caught.value)
    assert "tries in" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "trying again" in caplog.text
