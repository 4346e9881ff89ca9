"""The parent proxy, `upstream.via`: its URL, the CONNECT it is sent and what it answers. Its password is told to it
alone. Which requests go by it is `upstream`'s decision."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import socket
from urllib.parse import unquote_to_bytes

from proxy.address import Host
from proxy.settingvalue import Endpoint, parse_endpoint, parse_text

MAX_ANSWER = 16 * 1024  # bytes of its head
_HINT = 'write "http://user:password@proxy.example.com:3128"'
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])(?: [^\r\n]*)?\r\n")
_WRONG_CREDENTIALS = 407
_log = logging.getLogger("sallyport")


class Declined(OSError):
    """The parent proxy does not connect us; its words are not passed on."""


class Parent:
    """An HTTP proxy that dials for us; its text hides user and password."""

    __slots__ = ("_authorization", "_told", "endpoint")

    def __init__(self, endpoint: Endpoint, user: bytes = b"", password: bytes = b"") -> None:
        self.endpoint = endpoint
        self._authorization = base64.b64encode(user + b":" + password) if user or password else b""
        self._told = False

    def __str__(self) -> str:
        return f"http://{self.endpoint}"

    def __repr__(self) -> str:
        return f"Parent({str(self)!r})"

    def connect(self, host: Host, port: int) -> bytes:
        """The request for a tunnel (RFC 9110 section 9.3.6), also for plain http: what we decided is what goes through,
        and nobody reads it a second time. It holds the password."""
        authority = f"{host}:{port}".encode()
        proof = b"Proxy-Authorization: Basic %s\r\n" % self._authorization if self._authorization else b""
        return b"CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n" % (authority, authority, proof)

    def accepted(self, answer: bytes) -> bool:
        """Whether the tunnel stands; False while more of the answer must come.

        Raises Declined, also for bytes behind the head: no server speaks before we do.
        """
        end = answer.find(b"\r\n\r\n")
        if end < 0 and len(answer) < MAX_ANSWER:
            return False
        status = _STATUS.match(answer)
        if status and int(status[1]) == _WRONG_CREDENTIALS and not self._told:
            _log.error("the parent proxy %s does not take the user and password in upstream.via", self)
        self._told = bool(status and int(status[1]) == _WRONG_CREDENTIALS)
        if not status or status[1][:1] != b"2" or end + 4 != len(answer):
            raise Declined("the parent proxy does not connect")
        return True

    async def open(self, address: tuple[str, int], host: Host, port: int) -> socket.socket:
        """A connected socket to `host`, through the parent at `address`. Raises OSError."""
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, address)
            await loop.sock_sendall(sock, self.connect(host, port))
            answer = b""
            while not self.accepted(answer):
                data = await loop.sock_recv(sock, MAX_ANSWER)
                if not data:
                    raise Declined("the parent proxy hung up")
                answer += data
        except BaseException:
            sock.close()
            raise
        return sock


def parse_parent(value: object) -> Parent | None:
    """The parent proxy of an `http://` URL; None for null. Raises ValueError(message, hint) without the password."""
    if value is None:
        return None
    scheme, separator, rest = parse_text(value, "a URL").partition("://")
    if not separator or scheme.lower() != "http":
        raise ValueError("a parent proxy is a URL beginning with http://", _HINT)
    credentials, at, server = rest.removesuffix("/").rpartition("@")
    if any(mark in credentials for mark in "/?#@") or not rest.isprintable() or " " in rest:
        raise ValueError(
            "the parent proxy's URL is not well-formed", f'{_HINT}; percent-encode "/?#@%" in the password'
        )
    user, _, password = (unquote_to_bytes(part) for part in credentials.partition(":"))
    if at and (not user or b":" in user):
        raise ValueError("a parent proxy's user is not empty and holds no colon (RFC 7617 section 2)", _HINT)
    try:
        return Parent(parse_endpoint(server), user, password)
    except ValueError:
        raise ValueError("the parent proxy's URL names no host and port", _HINT) from None
