"""HTTP for the double: requests in, answers out, faults on demand."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import collections as collections  # adds its routes
from .api import Answer, Request, answer
from .store import Account, ApiError, Store


MAX_SECONDS = 900.0
_CHUNK = 2**16


@dataclass
class Fault:
    """Something that goes wrong for requests whose `METHOD /path` matches.

    Args:
        match (`str`): regular expression.
        status (`int`, *optional*): answer with it instead of doing what was asked.
        headers (`dict`, *optional*): of that answer.
        lost (`bool`): do what was asked, and close the connection without an answer.
        cut (`float`, *optional*): send only this share of the body, and close the connection.
        flip (`bool`): change a byte of the body.
        times (`int`): how often.
        after (`int`): how many matching requests go well before.
    """

    match: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    lost: bool = False
    cut: float | None = None
    flip: bool = False
    times: int = 1
    after: int = 0


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    token: str | None
    host: str
    range: str | None
    status: int


class HubServer:
    """The double, running in a thread from `with` on.

    Args:
        folder (`Path`): for the content.
        tokens (`dict[str, Account]`): who may log in.
        multipart_bytes (`int`): larger files are uploaded in parts of half that size.
        page_size (`int`): entries of a tree on one page.
    """

    def __init__(
        self,
        folder: Path,
        tokens: dict[str, Account],
        *,
        multipart_bytes: int = 2**23,
        page_size: int = 50,
    ):
        self.store = Store(folder, tokens)
        self.multipart_bytes, self.page_size = multipart_bytes, page_size
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        # Called as a request arrives, and again before its answer is sent.
        self.watch: Callable[[str, str, str], None] | None = None
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        # Another name of the same machine: to the client a host that must not see its token.
        self.cdn_url = f"http://localhost:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._timer = threading.Timer(MAX_SECONDS, self._http.shutdown)
        self._timer.daemon = True

    def __enter__(self) -> HubServer:
        self._thread.start()
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(timeout=10)

    def fault_for(self, line: str) -> Fault | None:
        with self.store.lock:
            for fault in self.faults:
                if re.search(fault.match, line) and fault.times > 0:
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def requests(self, match: str) -> list[Seen]:
        return [seen for seen in self.seen if re.search(match, f"{seen.method} {seen.path}")]


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def log_message(self, *_: Any) -> None:
            pass

        def _serve(self) -> None:
            url = urlsplit(self.path)
            path, line = unquote(url.path), f"{self.command} {unquote(url.path)}"
            body = self._body()
            if body is None:
                self.close_connection = True
                return
            if server.watch is not None:
                server.watch(self.command, path, "arrived")
            fault = server.fault_for(line)
            token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
            request = Request(
                self.command, url.path, parse_qs(url.query), dict(self.headers.items()), body, token, server
            )
            if fault is not None and fault.status is not None:
                result = Answer(fault.status, {"error": "on demand"}, dict(fault.headers))
            else:
                result = _answer(request)
            server.seen.append(
                Seen(self.command, path, token, self.headers.get("Host", ""), self.headers.get("Range"), result.status)
            )
            if server.watch is not None:
                server.watch(self.command, path, "answering")
            if fault is not None and fault.lost:
                self.close_connection = True
                return
            self._send(result, fault)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

        def _body(self) -> bytes | None:
            """None where the client went away in the middle."""
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            length = int(self.headers.get("Content-Length") or 0)
            body = b""
            while len(body) < length:
                chunk = self.rfile.read(min(_CHUNK, length - len(body)))
                if not chunk:
                    return None
                body += chunk
                if server.watch is not None and length > _CHUNK:
                    server.watch(self.command, self.path, "receiving")
            return body

        def _send(self, result: Answer, fault: Fault | None) -> None:
            body = result.body if isinstance(result.body, bytes) else json.dumps(result.body).encode()
            headers = {"Content-Type": "application/json", **result.headers}
            self.send_response(result.status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault is not None and fault.flip and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            if fault is not None and fault.cut is not None:
                body, self.close_connection = body[: int(len(body) * fault.cut)], True
            self.wfile.write(body)

        def handle(self) -> None:
            # A client that was killed is no error of the server.
            try:
                super().handle()
            except (ConnectionError, TimeoutError):
                self.close_connection = True

    return Handler


def _answer(request: Request) -> Answer:
    try:
        with request.server.store.lock:
            return answer(request)
    except ApiError as error:
        headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
        return Answer(error.status, {"error": error.message}, headers)
