"""TLS on a non-blocking socket, many records for each call of the kernel: OpenSSL by itself makes two to read a record
and one to send it. Knows no strands: what would have to wait raises BlockingIOError."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Any

RECORD = 16384  # bytes of plaintext in a TLS record at most (RFC 8446 section 5.1)
_HEAD = 5  # bytes in front of each, its length in the last two
_FULL = _HEAD + RECORD + 1 + 16  # with the type and the tag behind it (RFC 8446 section 5.2)
TAKEN = 4 * _FULL  # read from the kernel at a time


class Cipher:
    """The TLS of one socket. OpenSSL is given a whole record at a time: to be told that it wants more costs as much as
    to decipher one, and its buffers, which never shrink, do not grow beyond one."""

    __slots__ = (
        "_left",
        "_missing",
        "_over",
        "_put",
        "_read",
        "_receive",
        "_send",
        "_sock",
        "_take",
        "_write",
        "has_more",
        "inward",
        "outward",
        "tls",
        "unsent",
    )

    def __init__(self, context: ssl.SSLContext, sock: socket.socket, options: dict[str, Any]) -> None:
        """`options`: as for `ssl.SSLContext.wrap_bio`."""
        self._sock = sock
        self.inward, self.outward = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.inward, self.outward, **options)
        tls: Any = self.tls._sslobj  # type: ignore[attr-defined]  # SSLObject's own methods cost as much again
        self._read, self._write = tls.read, tls.write
        self._put, self._take = self.inward.write, self.outward.read
        self._receive, self._send = sock.recv, sock.send
        self._left = b""  # what was read too early
        self._missing = 0  # bytes of the record whose beginning OpenSSL has
        self._over: OSError | None = None  # why nothing more can be read
        self.has_more = True  # whether `read` may have something to say although the kernel tells of nothing new
        self.unsent: list[bytes | memoryview] = []

    def shake(self) -> bool:
        """Go on with the handshake; whether it is done. `flush` then, and `fill` while it is not. Raises OSError."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except OSError:
            with contextlib.suppress(OSError):
                self.flush()  # the alert
            raise
        self._left = self.inward.read()
        return True

    def fill(self) -> None:
        """Take in more of a handshake. Raises BlockingIOError, OSError."""
        if data := self._receive(TAKEN):
            self._put(data)
        else:
            self.inward.write_eof()

    @property
    def held(self) -> int:
        """More than none where `read` has something to say without the kernel."""
        return len(self._left) + (self._over is not None)

    def read(self) -> bytes:
        """What has arrived. Raises BlockingIOError, OSError: ssl.SSLZeroReturnError after a close_notify, and
        ssl.SSLEOFError without. What OpenSSL answers to it by itself is then in `outward`, for `flush`."""
        parts: list[bytes] = []
        while not parts:
            if self._over:
                raise self._over.with_traceback(None)
            data, missing = self._left, self._missing
            if len(data) < _HEAD:
                # Where records are full, it ends with one.
                most = TAKEN - _FULL + missing if 0 < missing < _FULL else TAKEN
                more = self._receive(most)
                if not more:
                    raise ssl.SSLEOFError
                self.has_more = len(more) == most  # of what comes after a short read epoll tells (epoll(7), question 9)
                data += more
            self._left = b""
            try:
                if missing or len(data) < _HEAD or len(data) - _HEAD != data[3] << 8 | data[4]:
                    self._decipher(memoryview(data), parts)
                    continue
                self._put(data)  # one record, as mostly
                plain: bytes = self._read(RECORD)
                if plain:
                    return plain
                raise ssl.SSLZeroReturnError
            except ssl.SSLWantReadError:
                pass  # it was one of TLS's own, such as a session ticket
            except OSError as error:
                self._over, self.has_more = error, True
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _decipher(self, data: memoryview, parts: list[bytes]) -> None:
        at, missing, size = 0, self._missing, len(data)
        while at < size:
            if not missing:
                if size - at < _HEAD:
                    self._left = bytes(data[at:])
                    break
                missing = _HEAD + (data[at + 3] << 8 | data[at + 4])
            end = at + missing
            self._put(data[at:end])
            if end > size:
                missing = end - size
                break
            at, missing = end, 0
            try:
                plain = self._read(RECORD)
            except ssl.SSLWantReadError:
                continue
            if not plain:
                raise ssl.SSLZeroReturnError
            parts.append(plain)
        self._missing = missing

    def send(self, data: bytes | memoryview) -> bool:
        """Encipher `data` and send it; whether nothing is left for `flush`. Raises OSError."""
        at, size, unsent = 0, len(data), self.unsent
        if size > RECORD:
            data = memoryview(data)
        while at < size:
            at += self._write(data[at : at + RECORD])
            unsent.append(self._take())
        try:
            if len(unsent) > 1:
                self.flush()
            elif unsent:
                sent = self._send(unsent[0])
                if sent < len(unsent[0]):
                    unsent[0] = unsent[0][sent:]
                    return False
                del unsent[0]
        except BlockingIOError:
            return False
        return True

    def flush(self) -> None:
        """Send what is enciphered. Raises BlockingIOError, OSError."""
        unsent = self.unsent
        if self.outward.pending:
            unsent.append(self._take())
        while unsent:
            if len(unsent) == 1:
                sent, size = self._send(unsent[0]), len(unsent[0])
            else:
                sent, size = self._sock.sendmsg(unsent), sum(map(len, unsent))
            if sent == size:
                unsent.clear()
            else:
                unsent[:] = [memoryview(b"".join(unsent))[sent:]]

    def say_goodbye(self) -> None:
        """Send close_notify, if that is possible at once."""
        with contextlib.suppress(OSError, ValueError):
            self.flush()
            with contextlib.suppress(ssl.SSLWantReadError):
                self.tls.unwrap()
            self.flush()
