"""A signed token (JWT, RFC 7519, in compact form) taken apart, and who its claims speak of. Verifies no signature."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.proof import Told, plain

MAX_TOKEN = 16 * 1024  # characters
_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)  # RFC 7515 section 7.1


class Unsigned(Exception):
    """The text is no signed token."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a token claims, what of it is signed, and the signature; nothing of it is proved yet."""

    header: dict[str, Any]
    claims: dict[str, Any]
    signed: bytes
    signature: bytes


def split(token: str) -> Parts:
    """Takes a token apart. Raises Unsigned."""
    match = _COMPACT.fullmatch(token) if len(token) <= MAX_TOKEN else None
    if not match:
        raise Unsigned
    header, claims = _json(match[1]), _json(match[2])
    if "crit" in header:  # RFC 7515 section 4.1.11: what is critical must be understood
        raise Unsigned
    return Parts(header, claims, token.rpartition(".")[0].encode("ascii"), _decode(match[3]))


def _json(text: str) -> dict[str, Any]:
    try:
        data = json.loads(_decode(text), object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        raise Unsigned from None
    if not isinstance(data, dict):
        raise Unsigned
    return data


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """RFC 7519 section 4: a claim that is there twice may be read in two ways."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _decode(text: str) -> bytes:
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        raise Unsigned from None
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii") != text:
        raise Unsigned  # RFC 4648 section 3.5: another spelling of the same bytes
    return data


def number(claims: Mapping[str, Any], name: str) -> float | None:
    """A NumericDate (Unix seconds); None where it is none."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def claim(claims: Mapping[str, Any], name: str) -> Any:
    """A claim by its name, or by a JSON pointer (RFC 6901) where `name` begins with `/`; None where it is not there."""
    if not name.startswith("/"):
        return claims.get(name)
    node: Any = claims
    for step in name[1:].split("/"):
        node = node.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
    return node


def subject(claims: Mapping[str, Any]) -> tuple[str, Told | None]:
    """Who acts, by `sub`; where `act` says that another acts for `sub` (RFC 8693 section 4.1), that one, and for whom.

    Empty where the token does not say it in one way only.
    """
    name, actor = claims.get("sub"), claims.get("act")
    if actor is None:
        return (name, None) if isinstance(name, str) else ("", None)
    acting = actor.get("sub") if isinstance(actor, dict) else None
    if not isinstance(acting, str) or not isinstance(name, str):
        return "", None
    return acting, Told(on_behalf_of=plain(name))
