"""Servers on 127.0.0.1 that can be told to misbehave."""

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil

from benchmarks.faults.workspace import PATIENCE_S, Workspace

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now; another process may still take it."""
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        return int(candidate.getsockname()[1])


@contextmanager
def server(
    workspace: Workspace, port: int, *command: str, **environment: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A server at `port`, ready; ended with the block if it has not been killed in it."""
    process = subprocess.Popen(
        command,
        cwd=workspace.folder,
        env=workspace.environment | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """`kill -9` of a process and of all below it, at once."""
    for part in (*psutil.Process(process.pid).children(recursive=True), process):
        part.kill()


@contextmanager
def s3(workspace: Workspace, **settings: str) -> Iterator[str]:
    """An S3 server with the bucket `bucket`; yields its URL."""
    port = free_port()
    moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with server(workspace, port, *moto, **settings):
        url = f"http://127.0.0.1:{port}"
        make = "import s3fs; s3fs.S3FileSystem().mkdir('bucket')"
        done = workspace.run(sys.executable, "-c", make, AWS_ENDPOINT_URL=url, **KEYS)
        if done.exit_code != 0:
            raise RuntimeError(done.output)
        yield url


Answer = Callable[[str, str], tuple[int, dict[str, str], bytes] | None]
"""`answer(method, path)`: status, headers and body in place of the server's; None: the server's."""


class Proxy:
    """Hands on HTTP requests to a server, unless `answer` has another idea."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self.answer: Answer = lambda *_: None
        self.seen: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.seen.append(f"{self.command} {self.path}")
                answered = proxy.answer(self.command, self.path)
                if answered is None:
                    connection = http.client.HTTPConnection(host, int(port), timeout=60)
                    connection.request(self.command, self.path, body, dict(self.headers))
                    response = connection.getresponse()
                    content = response.read()
                    answered = response.status, dict(response.getheaders()), content
                    connection.close()
                status, headers, content = answered
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = handle_any

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def proxy_to(target: str) -> Iterator[Proxy]:
    """A proxy in front of `target`, an `http://host:port`."""
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
