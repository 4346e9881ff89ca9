"""DNS inside a jail: every name gets an address, and nothing that is asked goes anywhere. Bytes in, bytes out.

The addresses are of 198.18.0.0/15 (RFC 2544), which all lead to the proxy's own listeners in the jail; what a client
then says in TLS or HTTP tells the proxy where it wants to go, so nobody has to remember which name got which.
"""

from __future__ import annotations

import struct
import zlib

NETWORK = (198, 18, 0, 0)
GATEWAY = "198.18.0.1"
_OURS = 256  # addresses at the beginning of the network that no name gets
_SPACE = 2**17 - 2 * _OURS
_HEAD = struct.Struct("!6H")
_ASKED = struct.Struct("!2H")
_ANSWER = struct.Struct("!3HIH")
_A, _IN = 1, 1
_QUERY_BITS = 0xF800  # QR and OPCODE (RFC 1035 section 4.1.1): zero in a plain query
_RECURSION = 0x0100
_RESPONSE = 0x8080  # QR and RA
_NOT_IMPLEMENTED = 4
_POINTER = 0xC00C  # the name of the question (RFC 1035 section 4.1.4)
TTL = 60  # seconds


def answer(query: bytes) -> bytes | None:
    """The response to one datagram: an address for A, an empty one for every other type; None for what is no query."""
    if len(query) < _HEAD.size or query[2] & 0x80:
        return None
    number, flags, questions, *_ = _HEAD.unpack_from(query)
    if flags & _QUERY_BITS or questions != 1:
        return _HEAD.pack(number, _RESPONSE | flags & _RECURSION | _NOT_IMPLEMENTED, 0, 0, 0, 0)
    end = _name_end(query, _HEAD.size)
    if end is None or end + _ASKED.size > len(query):
        return None
    name, (kind, group) = query[_HEAD.size : end], _ASKED.unpack_from(query, end)
    found = [address_for(name)] if (kind, group) == (_A, _IN) else []
    head = _HEAD.pack(number, _RESPONSE | flags & _RECURSION, 1, len(found), 0, 0)
    records = b"".join(_ANSWER.pack(_POINTER, _A, _IN, TTL, 4) + address for address in found)
    return head + query[_HEAD.size : end + _ASKED.size] + records


def address_for(name: bytes) -> bytes:
    """The four bytes that a name, as it is on the wire, always gets."""
    if name.lower() == b"\x09localhost\0":  # RFC 6761 section 6.3
        return bytes((127, 0, 0, 1))
    number = int.from_bytes(bytes(NETWORK)) + _OURS + zlib.crc32(name.lower()) % _SPACE
    return number.to_bytes(4)


def _name_end(query: bytes, at: int) -> int | None:
    """Where an uncompressed name ends; labels have at most 63 bytes and a name 255 (RFC 1035 section 2.3.4)."""
    begin = at
    while at < len(query) and at - begin < 255:
        size = query[at]
        if size == 0:
            return at + 1
        if size > 63:
            return None
        at += size + 1
    return None
