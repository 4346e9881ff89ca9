"""The admin endpoint: metrics, health, readiness and status, to be read only. Changes nothing and decides nothing.

It has no login: it listens on loopback unless the operator says otherwise, and the proxy never dials it.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from http.client import responses

from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    RequestStartLine,
    ResponseStartLine,
    format_timestamp,
)

from proxy.address import ip_literal
from proxy.metrics import CONTENT_TYPE, Metrics
from proxy.problem import UserError

ENDPOINTS = ("/metrics", "/healthz", "/readyz", "/api/status")
IDLE = 60.0  # seconds for a whole request head; Prometheus scrapes once in this time and keeps its connection
STALL = 30.0  # seconds for a client to take an answer
_HEADERS = 16 * 1024  # bytes
_BODY = 1024  # bytes; no request here has one
_JSON = "application/json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Status:
    """What the proxy says of itself; the defaults are not ready. `uptime` is in seconds."""

    version: str = ""
    uptime: float = 0.0
    policy: str = ""  # digest; empty: no rules were ever loaded
    rules: int = 0
    agents: Mapping[str, int] = field(default_factory=dict)  # state -> how many
    store_up: bool = False
    reload_problems: Sequence[str] = ()  # of the last reload; the rules before it are in force
    audit_problem: str = "the audit log is not open"
    workers: Sequence[Mapping[str, object]] = ()  # none: one process does everything
    reloads: int = 0  # how often the workers were to be replaced
    reload_problem: str = ""  # why the last time failed
    awaiting_restart: Sequence[str] = ()  # settings that were changed and that a reload cannot change

    def not_ready(self) -> dict[str, str]:
        """What stands against serving, each with why."""
        return {
            what: why
            for what, why, bad in (
                ("policy", "no rules were ever loaded", not self.policy),
                ("store", "the store does not answer", not self.store_up),
                ("audit", self.audit_problem, bool(self.audit_problem)),
            )
            if bad
        }

    def as_json(self) -> dict[str, object]:
        """The fields, in plain dicts and lists; `asdict` would break a Counter and cannot copy a read-only mapping."""
        plain: dict[str, object] = {"agents": dict(self.agents), "reload_problems": list(self.reload_problems)}
        plain |= {"workers": [dict(worker) for worker in self.workers], "awaiting_restart": [*self.awaiting_restart]}
        return {each.name: plain.get(each.name, getattr(self, each.name)) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes
    content_type: str = _JSON
    headers: Mapping[str, str] = field(default_factory=dict)


class Admin:
    """The endpoint on the running event loop; made by `start`."""

    def __init__(self, server: HTTPServer, port: int) -> None:
        self._server = server
        self.port = port

    @classmethod
    async def start(cls, host: str, port: int, metrics: Metrics, status: Callable[[], Status]) -> Admin:
        """Listen on `host` and `port` (0: the kernel's choice); `status` is asked for each answer and may not block.

        Raises UserError when the address cannot be had.
        """
        listener = _listen(host, port)
        server = HTTPServer(
            _Connections(metrics, status, host),
            max_header_size=_HEADERS,
            max_body_size=_BODY,
            idle_connection_timeout=IDLE,
            body_timeout=IDLE,
        )
        server.add_sockets([listener])
        return cls(server, listener.getsockname()[1])

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        self._server.stop()
        await self._server.close_all_connections()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        place = f"admin [{host}]:{port}" if ":" in host else f"admin {host}:{port}"
        if error.errno == errno.EADDRINUSE:
            words = "address already in use; stop the other process or set admin: to a free port"
        else:
            # create_server adds the address to strerror; a resolver's error number is none of the system's.
            known = error.errno is not None and error.errno > 0
            why = os.strerror(error.errno or 0) if known else str(error.strerror or error).partition(" (while")[0]
            words = f"{why.lower()}; set admin: to an address and port this user may listen on"
        raise UserError(f"{place}: {words}") from None
    listener.setblocking(False)
    return listener


class _Connections(HTTPServerConnectionDelegate):
    """Routes each request; below tornado's web framework, so there is no access log and no body parser."""

    def __init__(self, metrics: Metrics, status: Callable[[], Status], host: str) -> None:
        self._metrics = metrics
        self._status = status
        self._host = host

    def _is_ours(self, host: str) -> bool:
        """Whether Host names this address. On loopback a foreign name is a web page's, rebound to it in DNS."""
        bound = ip_literal(self._host)
        if bound is not None and not bound.is_loopback:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        return name in ("", "localhost", self._host) or ip_literal(name.strip("[]")) is not None

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        return _Request(self, request_conn)

    def answer(self, method: str, path: str, headers: HTTPHeaders) -> _Answer:
        """The answer to one request; a failure of ours is a 500 without its text."""
        if "Origin" in headers:
            return _error(403, "not for scripts of web pages")
        if not self._is_ours(headers.get("Host", "")):
            return _error(421, "ask for this address by its number or as localhost")
        if path not in ENDPOINTS:
            return _json(404, {"error": "no such endpoint", "endpoints": ENDPOINTS})
        if method not in ("GET", "HEAD"):
            return _error(405, "read only", {"Allow": "GET, HEAD"})
        try:
            return self._route(path)
        except Exception:
            _log.exception("admin %s failed", path)
            return _error(500, "internal")

    def _route(self, path: str) -> _Answer:
        if path == "/healthz":
            return _Answer(200, b"ok\n", "text/plain; charset=utf-8")
        if path == "/metrics":
            return _Answer(200, self._metrics.exposition(), CONTENT_TYPE)
        status = self._status()
        if path == "/readyz":
            bad = status.not_ready()
            body = {"ready": not bad, "not_ready": bad, "reload_problems": list(status.reload_problems)}
            return _json(503 if bad else 200, body)
        return _json(200, status.as_json())


class _Request(HTTPMessageDelegate):
    """One request; its body is read up to the limit and thrown away."""

    def __init__(self, connections: _Connections, connection: HTTPConnection) -> None:
        self._connections = connections
        self._connection = connection

    def headers_received(self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders) -> None:
        assert isinstance(start_line, RequestStartLine)
        self._method, self._headers = start_line.method, headers
        self._path = start_line.path.partition("?")[0]

    def finish(self) -> None:
        answer = self._connections.answer(self._method, self._path, self._headers)
        headers = HTTPHeaders(
            {
                "Content-Type": answer.content_type,
                "Content-Length": str(len(answer.body)),
                "Cache-Control": "no-store",
                "Date": format_timestamp(time.time()),
                **answer.headers,
            }
        )
        line = ResponseStartLine("HTTP/1.1", answer.status, responses[answer.status])
        body = None if self._method == "HEAD" else answer.body
        sent = self._connection.write_headers(line, headers, body)
        self._connection.finish()
        stall = asyncio.get_running_loop().call_later(STALL, self._connection.close)  # type: ignore[attr-defined]
        sent.add_done_callback(lambda _: stall.cancel())


def _json(status: int, body: object) -> _Answer:
    return _Answer(status, json.dumps(body).encode() + b"\n")


def _error(status: int, words: str, headers: Mapping[str, str] | None = None) -> _Answer:
    return _Answer(status, json.dumps({"error": words}).encode() + b"\n", _JSON, headers or {})
