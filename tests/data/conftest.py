"""Fixtures of the data tests: a proxy that breaks connections."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest


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
