"""An S3 server of the tests' own (moto), and a proxy before it that fails as object stores do."""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

SECRET = "s3cr3t-that-must-not-be-written-anywhere"
ACCESS = "AKIA-OF-THE-TESTS"
BUCKET = "unbake-tests"


@contextlib.contextmanager
def server(ip: str = "127.0.0.1") -> Iterator[str]:
    """An S3 server with an empty bucket, on one of this machine's addresses; its URL."""
    moto = ThreadedMotoServer(ip_address=ip, port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    address = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=address, **environment_arguments())
    client.create_bucket(Bucket=BUCKET)
    try:
        yield address
    finally:  # the servers of one process share their buckets: the next one is to begin with none
        urllib.request.urlopen(f"{address}/moto-api/reset", data=b"", timeout=60).close()
        moto.stop()


def environment_arguments() -> dict[str, str]:
    """Credentials as boto3's arguments."""
    return {"aws_access_key_id": ACCESS, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}


def environment(address: str) -> dict[str, str]:
    """Environment variables that lead the usual credential and endpoint chain to the server."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": ACCESS,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class Failures:
    """Which requests fail, and how: a seeded share of them; never the same request more than twice in a row."""

    kinds = ("500", "503", "reset", "cut", "slow")

    def __init__(self, share: float, seed: int, slow: float = 3.0) -> None:
        self.share, self.slow = share, slow
        self.made: Counter[str] = Counter()
        self.requests = 0
        self._rng, self._lock = random.Random(seed), threading.Lock()
        self._in_a_row: Counter[str] = Counter()

    def choose(self, request: str) -> str | None:
        """The way in which a request is to fail, or None."""
        with self._lock:
            self.requests += 1
            if self._rng.random() >= self.share or self._in_a_row[request] >= 2:
                self._in_a_row.pop(request, None)
                return None
            self._in_a_row[request] += 1
            kind = self._rng.choice(self.kinds)
            self.made[kind] += 1
            return kind


class GoesAway(Failures):
    """Storage that serves so many uploads, cuts the next one in the middle, and is gone from then on."""

    def __init__(self, uploads: int) -> None:
        super().__init__(0.0, 0)
        self._left = uploads

    def choose(self, request: str) -> str | None:
        """See `Failures.choose`."""
        if request.startswith("PUT"):
            with self._lock:
                self._left -= 1
        return "cut" if self._left < 0 else None


@contextlib.contextmanager
def proxy(upstream: str, failures: Failures) -> Iterator[str]:
    """A proxy before an S3 server; its address."""
    target = upstream.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            if self.headers.get("Expect", "").lower() == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            length = int(self.headers.get("Content-Length") or 0)
            kind = failures.choose(f"{self.command} {self.path}")
            if kind == "cut":  # half of an upload, then nothing
                self.rfile.read(length // 2)
                return self._hang_up()
            body = self.rfile.read(length)
            if kind == "reset":
                return self._hang_up()
            if kind == "slow":
                time.sleep(failures.slow)  # longer than the client waits
                return self._hang_up()
            if kind is not None:
                code = {"500": "InternalError", "503": "SlowDown"}[kind]
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
                return self._answer(int(kind), [("Content-Type", "application/xml")], text.encode())
            connection = http.client.HTTPConnection(target, timeout=60)
            try:
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                reply = connection.getresponse()
                headers = [
                    (name, value)
                    for name, value in reply.getheaders()
                    if name.lower() not in ("connection", "content-length", "date", "server")
                ]
                size = reply.getheader("Content-Length") if self.command == "HEAD" else None
                self._answer(reply.status, headers, reply.read(), size)
            finally:
                connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def _answer(
            self, status: int, headers: list[tuple[str, str]], body: bytes, size: str | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", size or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _hang_up(self) -> None:
            self.close_connection = True
            self.connection.close()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a client that gave up, or a connection that we cut

    httpd = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
    finally:
        httpd.shutdown()
        httpd.server_close()
