"""Serves a dashboard over HTTP, and makes pages on request."""

from __future__ import annotations

import re
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gemmascope_fast.analysis.dashboard.pages import Dashboard


def server(dashboard: Dashboard, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server that is not running yet: call its `serve_forever`.  Port 0: any free port."""
    page = lru_cache(maxsize=256)(dashboard.page)
    # takes seconds for 16k features; also does now what the first feature page would load and compile
    index = dashboard.index
    page(int(dashboard.collected.fired.argmax()))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # send head and body together: a second small packet would wait 40 ms for the first one's acknowledgement
        wbufsize = -1
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            match = re.fullmatch(r"/feature/(\d{1,9})\.html", path)
            if path in ("/", "/index.html"):
                self._send(HTTPStatus.OK, index)
            elif match and int(match[1]) < len(dashboard):
                self._send(HTTPStatus.OK, page(int(match[1])))
            else:
                self._send(HTTPStatus.NOT_FOUND, "<!doctype html><title>not found</title><p>There is no such page.")

        def _send(self, status: HTTPStatus, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Requests are not logged."""

    return ThreadingHTTPServer((host, port), Handler)
