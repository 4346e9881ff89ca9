"""The one normal form of a request: what is matched is what is forwarded. Nothing behind it sees raw bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import parse_qsl, unquote_to_bytes

from proxy.address import Host

DEFAULT_PORTS = {"https": 443, "http": 80}
MAX_READINGS = 32

type Field = tuple[bytes, bytes]

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110 section 5.5
_PLAIN_PATH = re.compile(r"(?:/(?![./])[A-Za-z0-9._~!$&'()*,=:@+-]*)+")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")
_UNESCAPED = re.compile(r"[^A-Za-z0-9._~!$&'()*,=:@+;/%-]")
_UNESCAPED_QUERY = re.compile(r"[^A-Za-z0-9._~!$&'()*,=:@+;/?%\[\]{}|^-]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Needless in a path: unreserved (RFC 3986 section 6.2.2.2) and those delimiters that mean nothing there.
_NEEDLESS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*,=:@")


class Ambiguous(ValueError):
    """A request that could be read in two ways, or in none; its text is for the agent."""


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request as it is matched and forwarded. `readings` are all ways an origin might read `path`, itself first."""

    method: str
    scheme: str
    host: Host
    port: int
    path: str = "/"
    query: str = ""
    headers: tuple[Field, ...] = ()
    upgrade: str = ""
    readings: tuple[str, ...] = ("/",)

    @staticmethod
    def parse(
        method: str, scheme: str, host: Host, port: int, target: str, headers: Sequence[Field] = ()
    ) -> RequestView:
        """The view of a request for `target` (path and query, latin-1) at an authority that was parsed before.

        Raises Ambiguous.
        """
        if not _TOKEN.fullmatch(method.encode("latin-1", "replace")):
            raise Ambiguous("the method is not a token")
        for name, value in headers:
            if not _TOKEN.fullmatch(name):
                raise Ambiguous("a header name is not a token")
            if _BAD_VALUE.search(value):
                raise Ambiguous("a header value holds a control character")
        raw, _, query = target.partition("?")
        path, readings = parse_path(raw or "/")
        upgrade = b",".join(value for name, value in headers if name.lower() == b"upgrade")
        return RequestView(
            method.upper(),
            scheme,
            host,
            port,
            path,
            _normal_query(query),
            tuple(headers),
            upgrade.decode("latin-1").strip().lower(),
            readings,
        )

    @property
    def authority(self) -> str:
        """The host, with its port where that is not the scheme's own (RFC 9110 section 4.2.3)."""
        return str(self.host) if self.port == DEFAULT_PORTS.get(self.scheme) else f"{self.host}:{self.port}"

    @property
    def target(self) -> str:
        """Host and path for a message; never the query, which may hold anything."""
        return self.authority + self.path

    @property
    def path_and_query(self) -> str:
        """The request target in origin form (RFC 9112 section 3.2.1)."""
        return f"{self.path}?{self.query}" if self.query else self.path

    def header_values(self, name: str) -> list[str]:
        """Every value of a header, latin-1."""
        wanted = name.lower().encode("latin-1")
        return [value.decode("latin-1") for key, value in self.headers if key.lower() == wanted]

    def query_values(self, name: str) -> list[str]:
        """Every value of a query parameter in every way it may be read: some origins also separate by `;`."""
        return [value for key, value in query_pairs(self.query) if key == name]


@lru_cache(maxsize=4096)
def query_pairs(query: str) -> tuple[tuple[str, str], ...]:
    """The decoded parameters of `query`, those of a second reading behind those of the first."""
    pairs = parse_qsl(query, keep_blank_values=True)
    if ";" in query:
        pairs += parse_qsl(query.replace("&", ";"), keep_blank_values=True, separator=";")
    return tuple(pairs)


def _normal_query(query: str) -> str:
    if "#" in query or _CONTROL.search(query):
        raise Ambiguous("the query holds a character that no query may hold")
    return _UNESCAPED_QUERY.sub(_escaped, query)


@lru_cache(maxsize=4096)
def parse_path(raw: str) -> tuple[str, tuple[str, ...]]:
    """The normal form of a path (RFC 3986 section 6.2.2) and all its readings.

    Raises Ambiguous for what no origin should be sent: control characters, bad escapes, octets that are not UTF-8
    (overlong forms among them), more than 32 readings.
    """
    if _PLAIN_PATH.fullmatch(raw):
        return raw, (raw,)
    if not raw.startswith("/") or "#" in raw or _CONTROL.search(raw):
        raise Ambiguous("the path is malformed")
    if any(match[1] is None for match in _ESCAPE.finditer(raw)):
        raise Ambiguous("the path holds a broken escape")
    octets = unquote_to_bytes(raw.encode("latin-1", "replace"))
    if _CONTROL.search(octets.decode("latin-1")):
        raise Ambiguous("the path holds a control character")
    try:
        octets.decode("utf-8")
    except UnicodeDecodeError:
        raise Ambiguous("the path is not UTF-8") from None
    normal = _normal(raw)
    return normal, _readings(normal)


def _normal(path: str) -> str:
    path = _UNESCAPED.sub(_escaped, path)
    return remove_dot_segments(_ESCAPE.sub(_needed, path))


def _escaped(match: re.Match[str]) -> str:
    return f"%{ord(match[0]) & 0xFF:02X}"


def _needed(match: re.Match[str]) -> str:
    if match[1] is None:
        return "%25"
    char = chr(int(match[1], 16))
    return char if char in _NEEDLESS else f"%{match[1].upper()}"


def remove_dot_segments(path: str) -> str:
    """`path` without `.` and `..` segments (RFC 3986 section 5.2.4)."""
    if "/." not in path:
        return path
    output: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del output[-1:]
        elif segment != ".":
            output.append(segment)
    if segments[-1] in (".", ".."):
        output.append("")
    return "/" + "/".join(output)


def _decode_once(path: str) -> str:
    return unquote_to_bytes(path).decode("latin-1")


_OTHER_READINGS: tuple[Callable[[str], str], ...] = (
    _decode_once,  # an origin that decodes before it splits, or twice
    lambda path: path.replace("%5C", "/"),  # IIS, WHATWG: a backslash separates
    lambda path: re.sub("/+", "/", path),  # nginx merge_slashes
    lambda path: re.sub(";[^/]*", "", path),  # servlet path parameters
)


def _readings(normal: str) -> tuple[str, ...]:
    if not any(mark in normal for mark in ("%", "//", ";")):
        return (normal,)
    found = {normal: None}
    queue = [normal]
    while queue:
        path = queue.pop()
        for read in _OTHER_READINGS:
            reading = _normal(read(path))
            if reading not in found:
                found[reading] = None
                queue.append(reading)
        if len(found) > MAX_READINGS:
            raise Ambiguous("the path has too many readings")
    return tuple(found)


def parse_path_pattern(text: str) -> str:
    """A path glob as a rule writes it, which must be in normal form.

    Raises ValueError(message, hint) with the right spelling.
    """
    if not text.startswith(("/", "**")):
        raise ValueError(f'path "{text}" does not begin with "/"', f'write "/{text}"')
    prefix = "" if text.startswith("/") else "/"
    try:
        latin = "".join(f"%{octet:02X}" if octet > 126 else chr(octet) for octet in text.encode())
        normal, _ = parse_path(prefix + latin)
    except Ambiguous as error:
        raise ValueError(f'path "{text}" can never match: {error}', "") from None
    if normal != prefix + text:
        raise ValueError(f'path "{text}" is not in normal form', f'write "{normal[len(prefix) :]}"')
    return text


def strip_headers(headers: Iterable[Field], names: frozenset[bytes]) -> list[Field]:
    """`headers` without any spelling of `names` (lower case)."""
    return [(name, value) for name, value in headers if name.lower() not in names]
