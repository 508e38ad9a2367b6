"""Stores for tests: a local S3 that fails on request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


class FaultyS3:
    """Moto's S3 behind a server that answers some requests as a store under load does.

    Attributes:
        url: of the server.
        faults: for each method and path (``GET /bucket/key``) what its next requests meet, in
            order: ``503``, ``cut`` (half of the body, then the connection ends), ``stall``,
            ``gone``, ``refused``.
        seen: how often each fault was met.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self.url = ""
        self.faults: dict[str, list[str]] = {}
        self.seen: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        left = self.faults.get(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}", [])
        if not left:
            return self._app(environ, start)
        fault = left.pop(0)
        self.seen[fault] += 1
        if fault == "503":
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>reduce your rate</Message></Error>"]
        if fault == "gone":
            start("404 Not Found", [("Content-Type", "application/xml")])
            return [b"<Error><Code>NoSuchKey</Code><Message>it is gone</Message></Error>"]
        if fault == "refused":
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>not you</Message></Error>"]
        if fault == "stall":
            time.sleep(4)
            raise ConnectionResetError("stalled")  # what was asked for late is not done late
        return _cut(b"".join(self._app(environ, start)))


def _cut(body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    raise ConnectionResetError("cut")


@contextmanager
def s3_server() -> Iterator[FaultyS3]:
    """A local S3, empty but for a bucket."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *args: Any) -> None:
            pass

    faulty = FaultyS3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faulty, threaded=True, request_handler=Quiet)
    faulty.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        server.shutdown()
        thread.join()
