"""Agents' tokens and gateways' keys: how they are made and recognised. Pure; where they are kept is not known here."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LENGTH = 43  # characters of base62: 256 bits
_TOKEN = re.compile(rf"(slp_[0-9A-Za-z]{{{_LENGTH}}})_([0-9a-f]{{8}})")


def make_token(random: Callable[[int], bytes], prefix: str = "slp") -> str:
    """A token from `random(n)`, n bytes fit for keys: `slp_`, 256 bits in base62, and a checksum for scanners.

    `slg` is the prefix of a gateway's key.
    """
    chars: list[str] = []
    while len(chars) < _LENGTH:
        # 248 = 4 * 62: larger bytes would make some characters likelier.
        chars += [_ALPHABET[byte % 62] for byte in random(_LENGTH) if byte < 248]
    body = f"{prefix}_" + "".join(chars[:_LENGTH])
    return f"{body}_{zlib.crc32(body.encode('ascii')):08x}"


def token_digest(token: str) -> str | None:
    """SHA-256 of a token in hex, or None for text that is no token; then nothing is hashed."""
    parts = _TOKEN.fullmatch(token)
    if not parts or zlib.crc32(parts[1].encode("ascii")) != int(parts[2], 16):
        return None
    return hashlib.sha256(token.encode("ascii")).hexdigest()  # 256 random bits need no slow hash
