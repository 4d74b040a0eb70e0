"""Faults between a real S3 server and the stream: the bytes that come out are the clean ones."""

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megadit.data.format.manifest import MANIFEST_NAME, Manifest
from megadit.data.loading.loader import Loader
from megadit.data.storage import open_store, store as storage
from megadit.data.storage.local_s3 import LocalS3
from megadit.recipe import Data

SEED, BATCH, STEPS = 9, 8, 12
FAULTS = [
    *["503"] * 14,  # longer than any client's own retries
    *["reset", None, "close", None, "flip", "503", "close", None, "stall", "reset", "flip"] * 2,
]

needs_obstore = pytest.mark.skipif(
    importlib.util.find_spec("obstore") is None, reason="needs obstore (requirements/tools.txt)"
)


def put(folder: Path, url: str) -> None:
    """Copy a data set; the ETags that its manifest states are those of the copies."""
    store = open_store(url)
    for path in filter(Path.is_file, folder.rglob("*")):
        store.put(str(path.relative_to(folder)), path.read_bytes())
    manifest = Manifest.load(url)
    shards = tuple(shard.model_copy(update={"etag": store.etag(shard.name)}) for shard in manifest.shards)
    store.put(MANIFEST_NAME, manifest.model_copy(update={"shards": shards}).sealed().dump())


def settings(url: str | Path, **changes: object) -> Data:
    base = {"num_streams": 4, "chunk_samples": 4, "chunks_per_group": 2, "resolution": 16}
    return Data(**({"url": str(url)} | base | changes))


def pictures(data: Data, first: int = 0, count: int = STEPS) -> Iterator[np.ndarray]:
    batches = Loader(data, SEED, BATCH, 0, 1).iterate(first)
    try:
        for _ in range(count):
            yield next(batches).images.numpy()
    finally:
        batches.close()


@pytest.fixture
def on_s3(raw: Path, s3_bucket: str) -> str:
    """The raw pictures in S3."""
    put(raw, f"{s3_bucket}/raw")
    return f"{s3_bucket}/raw"


@pytest.mark.parametrize("client", ["boto3", pytest.param("obstore", marks=needs_obstore)])
def test_faults_of_all_kinds_leave_no_trace(
    raw: Path, on_s3: str, s3: LocalS3, faulty_proxy: Callable, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    proxy = faulty_proxy(s3.endpoint, FAULTS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setattr(storage, "READ_TIMEOUT", 1.0)
    monkeypatch.setattr(storage, "LONGEST_DELAY", 0.2)
    found = list(pictures(settings(on_s3, client=client)))
    for one, other in zip(found, pictures(settings(raw)), strict=True):
        np.testing.assert_array_equal(one, other)
    if client == "boto3":  # obstore repeats what it likes
        assert proxy.done["503"] == 16
        assert all(proxy.done[fault] >= 2 for fault in ("reset", "close", "stall", "flip"))


@pytest.mark.slow  # SeaweedFS takes several seconds to come back
def test_the_server_is_killed_and_comes_back(
    raw: Path, tmp_path: Path, faulty_proxy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of the stream; another one takes over its folder, behind the same address."""
    with LocalS3(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.create_bucket("bucket")
        put(raw, "s3://bucket/raw")
        proxy = faulty_proxy(server.endpoint, [])
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        found = pictures(settings("s3://bucket/raw", chunk_samples=2))
        clean = pictures(settings(raw, chunk_samples=2))
        for _ in range(2):
            np.testing.assert_array_equal(next(found), next(clean))
        assert server._process is not None
        os.kill(server._process.pid, signal.SIGKILL)
        server.stop()

        def restart() -> None:
            server.start()
            proxy.target = int(server.endpoint.rpartition(":")[2])

        # The kernel ends the server with the thread that started it, so the stream is what runs in another.
        with ThreadPoolExecutor(1) as pool:
            rest = pool.submit(list, found)
            restart()
            for one, other in zip(rest.result(), clean, strict=True):
                np.testing.assert_array_equal(one, other)


def test_chunks_come_from_the_cache(
    raw: Path, on_s3: str, s3: LocalS3, faulty_proxy: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy = faulty_proxy(s3.endpoint, [])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    data = settings(on_s3, cache_folder=str(tmp_path / "cache"))
    first, asked = list(pictures(data)), proxy.done[None]
    np.testing.assert_array_equal(first, list(pictures(settings(raw))))
    files = list((tmp_path / "cache").glob("??/*"))
    files[0].write_bytes(bytes(len(files[0].read_bytes())))  # spoilt: a miss
    files[1].write_bytes(b"short")
    np.testing.assert_array_equal(list(pictures(data)), first)
    assert asked > 20
    assert proxy.done[None] - asked <= 2 + 16  # the two, and what the first stream had not read ahead
