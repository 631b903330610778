"""A proxy on the loopback interface: it keeps what a client asks and is answered, and may change a request."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_HOP_BY_HOP = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding", "keep-alive"}
Change = Callable[[str, dict[str, Any]], None]
"""`change(path, body)` edits the body of a request in place."""


@dataclass
class Exchange:
    """One request and its answer."""

    path: str
    body: dict[str, Any]
    """As the client sent it."""
    status: int = 0
    """0 while there is no answer."""
    answer: str = ""


class Proxy:
    """In front of `upstream`, to be used in a with statement; what runs through it is in `exchanges`."""

    def __init__(self, upstream: str) -> None:
        self.exchanges: list[Exchange] = []
        self.change: Change = lambda path, body: None
        handler = type("Handler", (_Handler,), {"proxy": self, "upstream": urlsplit(upstream).netloc})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def statuses(self) -> list[int]:
        """Of every request that has a body, in order."""
        return [exchange.status for exchange in self.exchanges if exchange.body]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    upstream: str

    def handle(self) -> None:
        # A client may drop a connection whenever it likes.
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, *arguments: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._forward(b"")

    do_HEAD = do_DELETE = do_GET

    def do_POST(self) -> None:
        self._forward(self._read())

    def _read(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, sent: bytes) -> None:
        exchange = Exchange(self.path, json.loads(sent) if sent else {})
        self.proxy.exchanges.append(exchange)
        if sent:
            body = json.loads(sent)
            self.proxy.change(self.path, body)
            sent = json.dumps(body).encode()
        headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP_BY_HOP}
        upstream = http.client.HTTPConnection(self.upstream, timeout=300)
        try:
            upstream.request(self.command, self.path, sent or None, headers)
            self._answer(exchange, upstream.getresponse())
        finally:
            upstream.close()

    def _answer(self, exchange: Exchange, response: http.client.HTTPResponse) -> None:
        exchange.status = response.status
        self.send_response(response.status)
        for key, value in response.getheaders():
            if key.lower() not in _HOP_BY_HOP:
                self.send_header(key, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while piece := response.read1(65536):
            exchange.answer += piece.decode(errors="replace")
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")
