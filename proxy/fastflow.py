"""mitmproxy's objects, made without their type checks, which cost more than the rest of a request."""

from __future__ import annotations

from collections.abc import Iterable

from mitmproxy import http
from mitmproxy.connection import Client, Server

from proxy.flow import STATE, FlowState, fast_headers
from proxy.http1 import ResponseHead
from proxy.request import Field

_NOWHERE = Server(address=None)


def new_request(
    version: bytes,
    method: bytes,
    scheme: bytes,
    authority: bytes,
    path: bytes,
    fields: Iterable[Field],
    now: float,
) -> http.Request:
    """A request as its client sent it, at `now` (Unix seconds)."""
    data = object.__new__(http.RequestData)
    data.__dict__ = {
        "http_version": version,
        "headers": fast_headers(fields),
        "content": None,
        "trailers": None,
        "timestamp_start": now,
        "timestamp_end": None,
        "host": authority.decode("latin-1"),
        "port": 0,
        "method": method,
        "scheme": scheme,
        "authority": authority,
        "path": path,
    }
    request = object.__new__(http.Request)
    request.__dict__ = {"data": data, "stream": False}
    return request


def copy_request(request: http.Request, **changed: object) -> http.Request:
    """Another one with the same data, but for what is `changed`."""
    data = object.__new__(http.RequestData)
    data.__dict__ = {**vars(request.data), **changed}
    copy = object.__new__(http.Request)
    copy.__dict__ = {"data": data, "stream": False}
    return copy


def new_response(head: ResponseHead) -> http.Response:
    """A response of which only the head is there."""
    data = object.__new__(http.ResponseData)
    data.__dict__ = {
        "http_version": b"HTTP/1.1",
        "headers": fast_headers(head.headers),
        "content": None,
        "trailers": None,
        "timestamp_start": 0.0,
        "timestamp_end": None,
        "status_code": head.status,
        "reason": head.phrase,
    }
    response = object.__new__(http.Response)
    response.__dict__ = {"data": data, "stream": False}
    return response


def new_flow(client: Client | None, request: http.Request, now: float, state: FlowState) -> http.HTTPFlow:
    """A flow that began at `now` (Unix seconds) and carries our state."""
    flow = object.__new__(http.HTTPFlow)
    flow.__dict__ = {
        "id": "",
        "client_conn": client,
        "server_conn": _NOWHERE,
        "live": True,
        "timestamp_created": now,
        "intercepted": False,
        "_resume_event": None,
        "_backup": None,
        "marked": "",
        "is_replay": None,
        "metadata": {STATE: state},
        "comment": "",
        "request": request,
    }
    return flow
