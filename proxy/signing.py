"""When a request that AWS Signature V4 shall be added to is signed: with its head, or once its body is here."""

from __future__ import annotations

from collections.abc import Callable

from mitmproxy import http

from proxy.flow import fast_headers
from proxy.outbound import Signing, sign
from proxy.reason import Reason
from proxy.request import RequestView
from proxy.sigv4 import OBJECT_STORES, STREAMING_UNSIGNED, UNSIGNED, hash_of
from proxy.upstream import Refused

_BODILESS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})


def sign_request(
    flow: http.HTTPFlow, view: RequestView, signing: Signing, limit: int, stamp: str
) -> Callable[[bytes], None] | None:
    """Sign a request as it is written in `flow`; what is returned has to be called with its body first.

    S3 takes bodies that are not signed, over TLS; any other service's are held, up to `limit` bytes.

    Raises Refused.
    """
    payload = _payload(flow, view, signing, limit)
    if payload is not None:
        _write(flow, view, signing, payload, stamp)
        return None
    return lambda body: _write(flow, view, signing, hash_of(body), stamp)


def _payload(flow: http.HTTPFlow, view: RequestView, signing: Signing, limit: int) -> str | None:
    if signing.declared.startswith("STREAMING-"):
        if signing.declared == STREAMING_UNSIGNED and view.scheme == "https":
            return STREAMING_UNSIGNED
        raise Refused(Reason.PROTOCOL_NOT_ALLOWED, "its body is signed in chunks, by a key it does not have.")
    headers = flow.request.headers
    length, chunked = headers.get("content-length"), "transfer-encoding" in headers
    if not chunked and (length == "0" or (length is None and not _unframed_body(flow, view))):
        return hash_of(b"")
    if signing.service in OBJECT_STORES and view.scheme == "https":
        return UNSIGNED
    if length is None or int(length) > limit:
        raise Refused(Reason.BODY_TOO_LARGE)
    return None


def _unframed_body(flow: http.HTTPFlow, view: RequestView) -> bool:
    """HTTP/2 needs no Content-Length; what a body then follows after all, AWS refuses."""
    return flow.request.is_http2 and view.method not in _BODILESS


def _write(flow: http.HTTPFlow, view: RequestView, signing: Signing, payload: str, stamp: str) -> None:
    fields = sign(view, signing, payload, stamp)
    flow.request.data.headers = fast_headers([*flow.request.headers.fields, *fields])
