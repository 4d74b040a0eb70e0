import multiprocessing
from pathlib import Path

import pytest

from megadit.data.storage import StorageError
from megadit.data.storage.cache import SLACK_SHARE, ChunkCache


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def test_ranges_come_back(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path / "cache", 1 << 20)
    assert cache.get("etag", 0, 5) is None
    cache.put("etag", 0, b"12345")
    assert cache.get("etag", 0, 5) == b"12345"
    for other in (("etag", 0, 4), ("etag", 1, 6), ("another", 0, 5)):
        assert cache.get(*other) is None
    assert ChunkCache(tmp_path / "cache", 1 << 20).get("etag", 0, 5) == b"12345"


def test_a_copy_cut_short_is_none(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 1 << 20)
    cache.put("etag", 0, b"12345")
    (path,) = tmp_path.glob("??/*")
    path.write_bytes(b"123")
    assert cache.get("etag", 0, 5) is None
    cache.put("etag", 0, b"12345")
    assert cache.get("etag", 0, 5) == b"12345"


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 100_000)
    for number in range(9):
        cache.put("etag", number, bytes(10_000))
    for _ in range(3):
        assert cache.get("etag", 0, 10_000) is not None  # used: the oldest file stays
        for number in range(10, 16):
            cache.put("etag", number, bytes(10_000))
            assert size(tmp_path) <= 100_000 * (1 + SLACK_SHARE) + 10_000
    assert cache.get("etag", 0, 10_000) is not None
    assert cache.get("etag", 1, 10_001) is None


def fill(folder: Path, name: str) -> None:
    cache = ChunkCache(folder, 100_000)
    for number in range(200):
        cache.put(name, number, bytes([number]) * 1000)
        found = cache.get(name, number, number + 1000)
        assert found in (None, bytes([number]) * 1000)  # another process may have thrown it away


def test_several_processes_share_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path, name)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert size(tmp_path) <= 100_000 * (1 + 2 * SLACK_SHARE) + 2_000


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        StorageError, match=r"data.cache_folder .*/file: .*; give another folder, or lower data.cache_gb"
    ):
        ChunkCache(tmp_path / "file", 1 << 20).put("etag", 0, b"1")
