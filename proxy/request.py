"""The one normal form of a request: what is matched is what is forwarded. Nothing behind it sees raw bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote_to_bytes

from proxy.address import Host
from proxy.bodymatch import Body

DEFAULT_PORTS = {"https": 443, "http": 80}
MAX_PATH = 8192  # bytes; RFC 9110 section 4.1 asks for 8000
MAX_READINGS = 32
MAX_PARAMETERS = 1000  # PHP drops the rest, which would be a second reading
_SHORT = 256  # characters: only such paths are worth remembering

type Field = tuple[bytes, bytes]

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")  # RFC 9110 section 5.6.2
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110 section 5.5
_OF_CONNECTION = re.compile(rb"[ \t]*(?:negotiate|ntlm)\b", re.IGNORECASE)  # RFC 4559 section 6
_PLAIN_PATH = re.compile(r"(?:/(?![./])[A-Za-z0-9._~!$&'()*,=:@+-]*)+")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")
_UNESCAPED = re.compile(r"[^A-Za-z0-9._~!$&'()*,=:@+;/%-]")
_UNESCAPED_QUERY = re.compile(r"[^A-Za-z0-9._~!$&'()*,=:@+;/?%\[\]{}|^-]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u0100-\U0010ffff]")  # or no octet at all
# Needless in a path: unreserved (RFC 3986 section 6.2.2.2) and those delimiters that mean nothing there.
_NEEDLESS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*,=:@")

# What is never forwarded: connection-specific fields (RFC 9110 section 7.6.1), Host (it follows the URL), identity, and
# what reverse proxies in front of us add to say who the client is. Framing stays, whatever Connection lists.
_NOT_FORWARDED = frozenset(
    {
        b"cf-connecting-ip",
        b"client-ip",
        b"connection",
        b"fastly-client-ip",
        b"forwarded",
        b"host",
        b"http2-settings",
        b"keep-alive",
        b"te",
        b"trailer",
        b"true-client-ip",
        b"upgrade",
        b"x-client-ip",
        b"x-cluster-client-ip",
        b"x-original-forwarded-for",
        b"x-real-ip",
        # Some frameworks take them for the URL, and so past the rule that matched: CVE-2018-14773
        b"x-http-host-override",
        b"x-original-host",
        b"x-original-url",
        b"x-rewrite-url",
    }
)
_NOT_FORWARDED_PREFIXES = (b"proxy-", b"sallyport-", b"x-envoy-", b"x-forwarded-")
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_OVERRIDES = frozenset({b"x-http-method", b"x-http-method-override", b"x-method-override"})
_OVERRIDE_PARAMETER = "_method"  # of a POST, to Rails, Laravel, Symfony and their kin
_DROPPED, _KEPT, _KEPT_OVERRIDE, _KEPT_AUTHORIZATION = 0, 1, 2, 3


class Ambiguous(ValueError):
    """A request that could be read in two ways, or in none; its text is for the agent."""


class RequestView(NamedTuple):
    """A request as it is matched and forwarded. `readings` are all ways an origin might read `path`, itself first.
    `overrides`: what else its method may be to an origin, from a header such as X-HTTP-Method-Override."""

    method: str
    scheme: str
    host: Host
    port: int
    path: str = "/"
    query: str = ""
    headers: tuple[Field, ...] = ()
    upgrade: str = ""
    readings: tuple[str, ...] = ("/",)
    overrides: frozenset[str] = frozenset()
    body: Body | None = None  # for rules that look at it; None: nobody has

    @staticmethod
    def parse(
        method: str, scheme: str, host: Host, port: int, target: str, headers: Sequence[Field] = ()
    ) -> RequestView:
        """The view of a request for `target` (path and query, latin-1) at an authority that was parsed before.

        What is never forwarded is not in its headers, so that no rule relies on it and no agent can name what an
        operator adds later in Connection.

        Raises Ambiguous.
        """
        return RequestView.of(method, scheme, host, port, target, HeaderFacts.of(headers))

    @staticmethod
    def of(method: str, scheme: str, host: Host, port: int, target: str, facts: HeaderFacts) -> RequestView:
        """The same, with headers whose facts are known.

        Raises Ambiguous.
        """
        path, query, readings = _parse_target(target)
        method, overrides = _method(method), facts.overrides
        if facts.upgrade == "websocket" and method != "GET":
            raise Ambiguous("only a GET asks for a WebSocket")  # RFC 6455 section 4.1
        if query and method == "POST":
            overrides |= _override_in(query)
        return RequestView(method, scheme, host, port, path, query, facts.forwarded, facts.upgrade, readings, overrides)

    def retargeted(self, host: Host, port: int, target: str) -> RequestView:
        """The same request for another target.

        Raises Ambiguous.
        """
        path, query, readings = _parse_target(target)
        return self._replace(host=host, port=port, path=path, query=query, readings=readings)

    def with_headers(self, headers: tuple[Field, ...]) -> RequestView:
        """The same request with other headers."""
        return self._replace(headers=headers)

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

    def header_values(self, name: str) -> tuple[list[str], ...]:
        """Every value of a header, latin-1, for each way to read names: to CGI `_` and `-` are the same."""
        wanted = name.lower().encode("latin-1")
        alike = wanted.replace(b"_", b"-")
        found = [(key.lower(), value.decode("latin-1")) for key, value in self.headers if fold(key) == alike]
        return [value for key, value in found if key == wanted], [value for _, value in found]

    def query_values(self, name: str) -> tuple[list[str], ...]:
        """Every value of a query parameter, for each way to read the query: some origins also separate by `;`."""
        return tuple([value for key, value in pairs if key == name] for pairs in query_pairs(self.query))


@lru_cache(maxsize=16)  # what is asked again is the request being decided; a query can be long
def query_pairs(query: str) -> tuple[list[tuple[str, str]], ...]:
    """The decoded parameters of `query` in each way it can be read."""
    pairs = parse_qsl(query, keep_blank_values=True)
    if ";" not in query:
        return (pairs,)
    return pairs, parse_qsl(query.replace("&", ";"), keep_blank_values=True, separator=";")


@lru_cache(maxsize=64)
def _method(method: str) -> str:
    if not _TOKEN.fullmatch(method.encode("latin-1", "replace")):
        raise Ambiguous("the method is not a token")
    return method.upper()


@lru_cache(maxsize=512)
def fold(name: bytes) -> bytes:
    """The name of a header in the one spelling that all others are read as.

    Raises Ambiguous.
    """
    if not _TOKEN.fullmatch(name):
        raise Ambiguous("a header name is not a token")
    return name.lower().replace(b"_", b"-")


@lru_cache(maxsize=512)
def _fate(name: bytes) -> int:
    """What becomes of a header."""
    folded = fold(name)
    if folded in _FRAMING and b"_" in name:
        raise Ambiguous("a header spells its framing with an underscore")
    if folded in _NOT_FORWARDED or folded.startswith(_NOT_FORWARDED_PREFIXES):
        return _DROPPED
    if folded == b"authorization":
        return _KEPT_AUTHORIZATION
    return _KEPT_OVERRIDE if folded in _OVERRIDES else _KEPT


def is_forwarded(name: bytes) -> bool:
    """Whether a header can be in a view at all.

    Raises Ambiguous.
    """
    return _fate(name) != _DROPPED


def is_own_header(name: bytes) -> bool:
    """Whether a header says what only the proxy may say."""
    return fold(name) in _FRAMING or not is_forwarded(fold(name))


@dataclass(frozen=True, slots=True)
class HeaderFacts:
    """What a request's headers say, read in one pass. `forwarded`: those that are for the origin. `upgrade`: what is
    asked for, lower case. `hosts`: every Host. `close`: the Connection header says so; `keep`: says the opposite.
    `overrides`: methods that some origin may take for the request's."""

    forwarded: tuple[Field, ...]
    upgrade: str = ""
    hosts: tuple[str, ...] = ()
    close: bool = False
    keep: bool = False
    overrides: frozenset[str] = frozenset()

    @staticmethod
    def of(headers: Sequence[Field]) -> HeaderFacts:
        """Those of `headers`.

        Raises Ambiguous.
        """
        if _BAD_VALUE.search(b"".join([value for _, value in headers])):
            raise Ambiguous("a header value holds a control character")
        kept: list[Field] = []
        hosts, upgrade, options, overrides = [], [], [], frozenset[str]()
        for entry in headers:
            name, value = entry
            if fate := _fate(name):
                kept.append(entry)
                if fate == _KEPT_OVERRIDE:
                    overrides |= _methods_in(value.decode("latin-1"))
                elif fate == _KEPT_AUTHORIZATION and _OF_CONNECTION.match(value):
                    raise Ambiguous("it signs in a connection (Negotiate, NTLM), which agents share")
                continue
            match name.lower():
                case b"connection":
                    options.append(value)
                case b"host":
                    hosts.append(value.decode("latin-1"))
                case b"upgrade":
                    upgrade.append(value)
        if listed := frozenset[bytes]().union(*map(_listed, options)):
            kept = [entry for entry in kept if fold(entry[0]) not in listed]
        said = [token.strip() for value in options for token in value.lower().split(b",")]
        return HeaderFacts(
            tuple(kept),
            b",".join(upgrade).decode("latin-1").strip().lower(),
            tuple(hosts),
            b"close" in said,
            b"keep-alive" in said,
            overrides,
        )


def _methods_in(value: str) -> frozenset[str]:
    """Every method that `value` may be read as; never none."""
    return frozenset({value.strip().upper(), *re.findall("[A-Z]+", value.upper())})


def _override_in(query: str) -> frozenset[str]:
    found = (value for pairs in query_pairs(query) for key, value in pairs if _php_name(key) == _OVERRIDE_PARAMETER)
    return frozenset[str]().union(*map(_methods_in, found))


def _php_name(key: str) -> str:
    """The name that PHP gives a parameter: no leading spaces, `.` and space are `_`, and `[` begins an index."""
    return re.sub("[. ]", "_", key.lstrip(" ").partition("[")[0])


@lru_cache(maxsize=64)
def _listed(connection: bytes) -> frozenset[bytes]:
    """What a Connection header names, less what goes anyway and what must stay."""
    names = {token.strip().lower().replace(b"_", b"-") for token in connection.split(b",")}
    return frozenset(names - _NOT_FORWARDED - _FRAMING - {b"", b"close"})


def _parse_target(target: str) -> tuple[str, str, tuple[str, ...]]:
    raw, _, query = target.partition("?")
    path, readings = parse_path(raw or "/")
    return path, _normal_query(query) if query else "", readings


def _normal_query(query: str) -> str:
    if "#" in query or _CONTROL.search(query):
        raise Ambiguous("the query holds a character that no query may hold")
    if query.count("&") + query.count(";") >= MAX_PARAMETERS:
        raise Ambiguous(f"the query has more than {MAX_PARAMETERS} parameters")
    return _UNESCAPED_QUERY.sub(_escaped, query)


def parse_path(raw: str) -> tuple[str, tuple[str, ...]]:
    """The normal form of a path (RFC 3986 section 6.2.2) and all its readings.

    Raises Ambiguous for what no origin should be sent: control characters, bad escapes, octets that are not UTF-8
    (overlong forms among them), more than 8 KiB, more than 32 readings or 32 KiB of them.
    """
    return _parse_short_path(raw) if len(raw) <= _SHORT else _parse_path(raw)


def _parse_path(raw: str) -> tuple[str, tuple[str, ...]]:
    if len(raw) > MAX_PATH:
        raise Ambiguous(f"the path is longer than {MAX_PATH} bytes")
    if _PLAIN_PATH.fullmatch(raw):
        return raw, (raw,)
    if not raw.startswith("/") or "#" in raw or _CONTROL.search(raw):
        raise Ambiguous("the path is malformed")
    if any(match[1] is None for match in _ESCAPE.finditer(raw)):
        raise Ambiguous("the path holds a broken escape")
    octets = unquote_to_bytes(raw.encode("latin-1"))
    if _CONTROL.search(octets.decode("latin-1")):
        raise Ambiguous("the path holds a control character")
    try:
        octets.decode("utf-8")
    except UnicodeDecodeError:
        raise Ambiguous("the path is not UTF-8") from None
    normal = remove_dot_segments(_spelt(raw))
    return normal, _readings(normal)


_parse_short_path = lru_cache(maxsize=1024)(_parse_path)


def _spelt(path: str) -> str:
    """`path` with the escapes it needs and no others."""
    return _ESCAPE.sub(_needed, _UNESCAPED.sub(_escaped, path))


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


def _decoded(path: str) -> str:
    return unquote_to_bytes(path).decode("latin-1")


# What origins do to a path before they route it, each alone and in any order. None of it is undone or taken together:
# `/a%2F%2F..%2Fb` is `/a/b` to those that resolve dots first, and `/b` to those that merge slashes first.
_OTHER_READINGS: tuple[Callable[[str], str], ...] = (
    lambda path: _spelt(_decoded(path)),  # decodes, and what reads it then decodes again
    lambda path: _spelt(_decoded(path).replace("%", "%25")),  # decodes once: a percent sign is one
    lambda path: path.replace("%5C", "/"),  # IIS, WHATWG: a backslash separates
    lambda path: re.sub("/+", "/", path),  # nginx merge_slashes
    lambda path: re.sub("^//+[^/]*", "", path) or "/",  # a network-path reference: new URL(path, base), urlsplit(path)
    lambda path: re.sub(";[^/]*", "", path),  # servlet path parameters
    lambda path: remove_dot_segments(path),
)


def _readings(normal: str) -> tuple[str, ...]:
    if not any(mark in normal for mark in ("%", "//", ";")):
        return (normal,)
    most = min(MAX_READINGS, MAX_READINGS * 1024 // len(normal))
    found = {normal: None}
    queue = [normal]
    while queue:
        path = queue.pop()
        for read in _OTHER_READINGS:
            reading = read(path)
            if reading not in found:
                found[reading] = None
                queue.append(reading)
        if len(found) > most:
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


def strip_headers(headers: Iterable[Field], names: Iterable[bytes]) -> list[Field]:
    """`headers` without any spelling of `names`."""
    folded = [fold(name) for name in names]
    return [field for field in headers if fold(field[0]) not in folded]
