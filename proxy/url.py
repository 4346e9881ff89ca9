"""A request from a URL as people write it, and back. For operators; what a wire gives is read by `flow`."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote

from proxy.address import Host, parse_authority
from proxy.problem import UserError
from proxy.request import DEFAULT_PORTS, Ambiguous, RequestView

_ASCII = "".join(map(chr, range(128)))


def parse_url(method: str, url: str, headers: Iterable[tuple[str, str]] = ()) -> RequestView:
    """The view of a request for `url`, read as a client would: the fragment is not sent, other than ASCII is escaped.

    Raises UserError where it is no http or https URL, and Ambiguous for what the proxy would refuse as such.
    """
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in DEFAULT_PORTS:
        raise UserError(f'"{url}" is not a URL: write it whole, such as https://api.example.com/path')
    rest = rest.partition("#")[0]
    end = min((at for mark in "/?\\" if (at := rest.find(mark)) >= 0), default=len(rest))
    authority, target = rest[:end], rest[end:]
    if "@" in authority:
        raise Ambiguous("the URL holds a user name or password")
    try:
        host, port = _authority(authority, scheme)
    except ValueError:
        raise Ambiguous("its authority is not a host and port") from None
    if not target.startswith("/"):
        target = "/" + target if target[:1] in ("", "?") else target
    target = quote(target, safe=_ASCII, errors="surrogateescape")
    fields = [(name.encode("latin-1", "replace"), value.encode(errors="surrogateescape")) for name, value in headers]
    return RequestView.parse(method, scheme, host, port, target, fields)


def _authority(text: str, scheme: str) -> tuple[Host, int]:
    _, colon, port = text.rpartition(":")
    if colon and not port.endswith("]"):
        return parse_authority(text if port else f"{text}{DEFAULT_PORTS[scheme]}")
    return parse_authority(f"{text}:{DEFAULT_PORTS[scheme]}")


def url_of(view: RequestView) -> str:
    """The URL of a request in normal form."""
    return f"{view.scheme}://{view.authority}{view.path_and_query}"
