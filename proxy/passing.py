"""The body of an answer on its way from an upstream to a client: out of one framing, looked through, into the other.
Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from proxy.http1 import LAST_CHUNK, Body, chunk


class Passing:
    """One body. `scan` is given its payload as it comes, and an empty piece at the end; it says what passes on."""

    __slots__ = ("_body", "_buffer", "_chunked", "_scan")

    def __init__(
        self, body: Body, buffer: bytearray, scan: Callable[[bytes], Iterable[bytes]], *, chunked: bool
    ) -> None:
        """`buffer`: what the upstream sent and nobody took; what stays there at the end is no part of the body."""
        self._body = body
        self._buffer = buffer
        self._scan = scan
        self._chunked = chunked

    @property
    def done(self) -> bool:
        """Whether all of it has come."""
        return self._body.done

    def feed(self, data: bytes) -> bytes:
        """What goes to the client for `data`, which the upstream sent; it is empty where the upstream hung up. Raises
        BadMessage, also where that is too early, and what `scan` raises."""
        body, buffer = self._body, self._buffer
        if not data:
            body.end()
        payload = None if buffer else body.payload(data)
        if payload is None:
            buffer += data
            payload = body.take(buffer)
        return self.pass_on(payload)

    def pass_on(self, payload: bytes) -> bytes:
        """The same for what was taken out of its framing already."""
        pieces = list(self._scan(payload)) if payload else []
        if self._body.done:
            pieces += self._scan(b"")
        if not self._chunked:
            return b"".join(pieces)
        chunks = map(chunk, filter(None, pieces))  # an empty one would end the body
        return b"".join([*chunks, LAST_CHUNK if self._body.done else b""])
