"""The two things of a TLS ClientHello that are needed before a handshake: the server name and the protocols. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HELLO = 16384 + 5  # bytes: one record (RFC 8446 section 5.1)
_SERVER_NAME, _ALPN = 0, 16  # extension types: RFC 6066 section 3, RFC 7301 section 3.1
_ENCRYPTED = 0xFE0D  # encrypted_client_hello (IANA, TLS ExtensionType values)


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What the client asks for. `encrypted`: another hello lies in it that only the server can read."""

    server_name: str | None = None
    protocols: tuple[bytes, ...] = ()
    encrypted: bool = False


def is_tls(start: bytes) -> bool:
    """Whether bytes may begin a TLS handshake record."""
    size = int.from_bytes(start[3:5]) if len(start) >= 5 else 0
    return b"\x16\x03".startswith(start[:2]) and (len(start) < 3 or start[2] <= 3) and size <= MAX_HELLO - 5


def parse_client_hello(data: bytes) -> ClientHello | None:
    """The ClientHello at the start of a connection; None while the first record is incomplete.

    Raises ValueError for what is malformed or spread over several records.
    """
    if not is_tls(data):
        raise ValueError("no TLS handshake record")
    if len(data) < 5:
        return None
    size = int.from_bytes(data[3:5])
    if not 4 < size <= MAX_HELLO - 5:
        raise ValueError("no TLS handshake record")
    if len(data) < 5 + size:
        return None
    body = data[9 : 5 + size]
    if data[5] != 1 or int.from_bytes(data[6:9]) != len(body):
        raise ValueError("not one ClientHello in one record")
    return _extensions(_after_fixed_part(body))


def _vector(data: bytes, at: int, width: int) -> tuple[bytes, int]:
    """A length-prefixed vector and where it ends (RFC 8446 section 3.4)."""
    start = at + width
    end = start + int.from_bytes(data[at:start])
    if end > len(data):
        raise ValueError("a length of the ClientHello is wrong")
    return data[start:end], end


def _only_vector(data: bytes, at: int, width: int) -> bytes:
    """A vector that ends where `data` does: behind it, another reader could find another answer."""
    content, end = _vector(data, at, width)
    if end != len(data):
        raise ValueError("a length of the ClientHello is wrong")
    return content


def _after_fixed_part(body: bytes) -> bytes:
    at = 2 + 32  # version, random
    for width, unit in ((1, 1), (2, 2), (1, 1)):  # session id, cipher suites of two bytes each, compression methods
        content, at = _vector(body, at, width)
        if len(content) % unit:
            raise ValueError("a length of the ClientHello is wrong")
    return _only_vector(body, at, 2) if at < len(body) else b""


def _extensions(data: bytes) -> ClientHello:
    found: dict[int, bytes] = {}
    at, size = 0, len(data)
    while at < size:
        start = at + 4
        end = start + (data[at + 2] << 8 | data[at + 3]) if start <= size else start
        if end > size:
            raise ValueError("a length of the ClientHello is wrong")
        kind = data[at] << 8 | data[at + 1]
        if kind in found:
            raise ValueError("the ClientHello has an extension twice")  # RFC 8446 section 4.2
        found[kind] = data[start:end]
        at = end
    name, protocols = found.get(_SERVER_NAME), found.get(_ALPN)
    return ClientHello(
        None if name is None else _host_name(_only_vector(name, 0, 2)),
        () if protocols is None else tuple(_each(_only_vector(protocols, 0, 2))),
        _ENCRYPTED in found,
    )


def _host_name(names: bytes) -> str:
    """The one entry there may be, of the one type there is (RFC 6066 section 3)."""
    if names[:1] != b"\0":
        raise ValueError("the server name is no host name")
    return _only_vector(names, 1, 2).decode("ascii", "replace")


def _each(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        item, at = _vector(data, at, 1)
        found.append(item)
    return found
