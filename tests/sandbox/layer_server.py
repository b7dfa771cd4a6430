"""A layer store over HTTP for tests, with every way of misbehaving that a test asks for."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote


class Store:
    """Serves a directory. `fault` applies to ranges, `delay_s` to every one of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fault = ""
        """'' | corrupt | ignore | shifted | short | drip | drip-head | down"""
        self.delay_s = 0.0
        self.ranges: list[tuple[int, int]] = []
        """(first, last) of every range that was asked for."""
        self.release = threading.Event()
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                store.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # clients hang up on us in half of the tests

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path = self.root / unquote(handler.path).lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if self.fault == "down":
            handler.close_connection = True
            return
        if not path.is_file():
            handler.send_error(404)
            return
        data = path.read_bytes()
        if asked is None or self.fault == "ignore":
            handler.send_response(200)
        else:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            self.ranges.append((first, last))
            time.sleep(self.delay_s)
            told = first + (1 if self.fault == "shifted" else 0)
            size = len(data)
            data = data[first : last + 1]
            if self.fault == "corrupt":
                data = data[:-1] + bytes([data[-1] ^ 1])
            if self.fault == "drip-head":
                self._drip(handler, b"HTTP/1.1 206 Partial Content\r\n" + b"X-Slow: and slower\r\n" * 1000)
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {told}-{last}/{size}")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if self.fault == "drip":
            self._drip(handler, data)
        elif self.fault == "short":
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
        else:
            handler.wfile.write(data)

    def _drip(self, handler: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
        with contextlib.suppress(OSError):
            for byte in data:
                handler.wfile.write(bytes([byte]))
                if self.release.wait(0.05):
                    return

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Store]:
    store = Store(root)
    try:
        yield store
    finally:
        store.close()
