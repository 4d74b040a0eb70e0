"""Fixtures of the data tests: data sets made by hand, and proxies that break connections and answers."""

import contextlib
import io
import itertools
import socket
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megadit.data.format.index import PLACE, Index
from megadit.data.format.manifest import ImageFacts, LatentFacts, Manifest, ShardFacts
from megadit.data.storage import open_store


class BreakingProxy:
    """Forwards TCP connections to `port`; closes the n-th after `cuts[n]` bytes of its answers, if there is such."""

    def __init__(self, port: int) -> None:
        self.target, self.cuts, self.broken = port, [], 0
        self.on_break: Callable[[], None] = lambda: None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            limit = self.cuts.pop(0) if self.cuts else None
            threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, limit), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        try:
            while data := source.recv(4096):
                if limit is not None and len(data) >= limit:
                    sink.sendall(data[:limit])
                    self.broken += 1
                    self.on_break()
                    break
                limit = None if limit is None else limit - len(data)
                sink.sendall(data)
        except OSError:
            pass  # the other direction has closed both
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the other direction, which close() would not
            end.close()


@pytest.fixture
def breaking_proxy() -> Iterator[Callable[[str], BreakingProxy]]:
    proxies: list[BreakingProxy] = []

    def start(endpoint: str) -> BreakingProxy:
        proxies.append(BreakingProxy(int(endpoint.rpartition(":")[2])))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


FAULTS = ("503", "reset", "close", "stall", "flip")


class FaultyProxy:
    """An HTTP proxy of one S3 server that spoils answers to GET by a script: the n-th in the way of `script[n]`.

    503: says so; reset, close: ends the connection within the body; stall: never sends the rest; flip: changes one
    byte; None, and whatever comes after the script: forwards. `done` counts what was done.
    """

    def __init__(self, port: int, script: Sequence[str | None]) -> None:
        self.target, self.script = port, iter(script)
        self.done: dict[str | None, int] = {}
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._open: set[socket.socket] = set()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        with self._lock:
            for client in self._open:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request for each connection: clients open another."""
        try:
            request = _read_head(client)
            is_get = request.startswith(b"GET ") and b"\r\nrange:" in request.lower()
            with self._lock:
                fault = next(self.script, None) if is_get else None
                self.done[fault] = self.done.get(fault, 0) + is_get
            if fault == "503":
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                self._forward(client, request, fault)
        except OSError:
            pass  # the client or the server has gone away
        with self._lock:
            self._open.discard(client)
        client.close()

    def _forward(self, client: socket.socket, request: bytes, fault: str | None) -> None:
        with socket.create_connection(("127.0.0.1", self.target)) as server:
            server.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            answer = _read_all(server)
        head, body = answer.split(b"\r\n\r\n", 1)
        half = len(body) // 2
        if fault == "flip":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :] if body else body
        cut = fault in ("reset", "close", "stall")
        client.sendall(head + b"\r\n\r\n" + (body[:half] if cut else body))
        if fault == "stall":
            while client.recv(4096):  # until the client loses its patience
                pass
        if fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _read_head(connection: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        data = connection.recv(65536)
        if not data:
            raise ConnectionError("no whole request")
        head += data
    return head


def _read_all(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(1 << 20):
        parts.append(data)
    return b"".join(parts)


@pytest.fixture
def faulty_proxy() -> Iterator[Callable[[str, Sequence[str | None]], FaultyProxy]]:
    proxies: list[FaultyProxy] = []

    def start(endpoint: str, script: Sequence[str | None]) -> FaultyProxy:
        proxies.append(FaultyProxy(int(endpoint.rpartition(":")[2]), script))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


Shards = Sequence[tuple[str | None, Sequence[dict[str, bytes]]]]


def write_data_set(url: str, shards: Shards, **facts: Any) -> Manifest:
    """A data set of (bucket, members of each sample) for each shard; `facts` go into the manifest."""
    store, described, keys = open_store(url), [], []
    kinds = tuple(shards[0][1][0])
    places: dict[str, list[tuple[int, int, int]]] = {kind: [] for kind in kinds}
    numbers = itertools.count()
    for number, (bucket, samples) in enumerate(shards):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for members in samples:
                keys.append(f"k{next(numbers):06d}")
                for kind, data in members.items():
                    info = tarfile.TarInfo(f"{keys[-1]}.{kind}")
                    info.size = len(data)
                    places[kind].append((tar.offset + tarfile.BLOCKSIZE, len(data), zlib.crc32(data)))
                    tar.addfile(info, io.BytesIO(data))
        name, data = f"shard-{number}.tar", buffer.getvalue()
        store.put(name, data)
        described.append(
            ShardFacts(name=name, num_samples=len(samples), num_bytes=len(data), bucket=bucket, etag=store.etag(name))
        )
    index = Index(
        np.array(keys, dtype=np.bytes_),
        {kind: np.array(rows, dtype=PLACE) for kind, rows in places.items()},
        facts.pop("sizes", None),
    )
    manifest = Manifest(
        name="by hand",
        inputs="",
        num_samples=len(keys),
        members=kinds,
        shards=tuple(described),
        index=index.write(store),
        **facts,
    ).sealed()
    store.put("manifest.json", manifest.dump())
    return manifest


@pytest.fixture
def data_set() -> Callable[..., Manifest]:
    return write_data_set


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


LATENT_FACTS = LatentFacts(
    encoder="none", weights_sha256="", channels=4, downsampling=8, moments=True, scaling_factor=0.5, shift_factor=0.25
)


@pytest.fixture(scope="session")
def bucketed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and captions of three resolutions, the shards of one not together, and too few of a fourth."""
    draws = np.random.default_rng(0)

    def samples(height: int, width: int, count: int) -> list[dict[str, bytes]]:
        shape = (2, 4, height // 8, width // 8)
        return [
            {"latent.npy": npy(draws.standard_normal(shape).astype(np.float16)), "txt": draws.bytes(9).hex().encode()}
            for _ in range(count)
        ]

    sizes = [(16, 16, 100), (16, 32, 60), (16, 16, 31), (32, 16, 55), (32, 32, 7)]
    folder = tmp_path_factory.mktemp("bucketed")
    shards = [(f"{height}x{width}", samples(height, width, count)) for height, width, count in sizes]
    write_data_set(str(folder), shards, latent=LATENT_FACTS)
    return folder


def jpeg(draws: np.random.Generator, height: int, width: int) -> bytes:
    """A smooth picture with some grain."""
    rough = Image.fromarray(draws.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    pixels = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = np.clip(pixels + draws.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of sizes of their own with JSON between them, as in SA-1B."""
    draws = np.random.default_rng(1)
    sizes = [(90, 60), (60, 90), (60, 60)]
    shapes = [sizes[number] for number in draws.integers(0, 3, 120)]
    samples = [{"jpg": jpeg(draws, *shape), "json": b"{" + b" " * 300 + b"}"} for shape in shapes]
    folder = tmp_path_factory.mktemp("raw")
    shards = [(None, samples[:70]), (None, samples[70:])]
    image = ImageFacts(member="jpg", resize=None)
    write_data_set(str(folder), shards, image=image, sizes=np.array(shapes, dtype=np.uint16))
    return folder
