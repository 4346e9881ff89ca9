"""The values in a rule, each parsed from what YAML gave. Each function raises ValueError(message, hint).

Where a value stands, and what it means beside others, is not known here.
"""

from __future__ import annotations

import re

import re2

from proxy.address import Host, HostPattern
from proxy.credential import KINDS, parse_name
from proxy.pattern import Glob, compile_regex, path_glob, text_glob
from proxy.policy import NEVER_FORWARDED
from proxy.problem import UserError
from proxy.request import is_forwarded, parse_path_pattern
from proxy.validation import did_you_mean
from proxy.yamltree import kind_of

INJECT_KINDS = tuple(kind for kind in KINDS if kind != "static")
_VERSION = 1
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_AGENT = re.compile(r"[A-Za-z0-9._*-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Framing, the hop, and identity are the proxy's own; a rule that set them could smuggle (RFC 9112 section 11.2).
_OWN_HEADERS = frozenset(
    {"content-length", "transfer-encoding", "connection", "keep-alive", "upgrade", "te", "trailer"},
)
_OWN_PREFIXES = ("proxy-", "sallyport-")


def parse_text(value: object) -> str:
    """Text, an empty one too."""
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {kind_of(value)}", "")
    return value


def parse_some_text(value: object) -> str:
    """Text that is not empty."""
    if not parse_text(value):
        raise ValueError("expected text, got an empty one", "")
    return parse_text(value)


def parse_version(value: object) -> int:
    """The one version of the format there is."""
    if value is True or value != _VERSION:
        shown = value if isinstance(value, int) and not isinstance(value, bool) else kind_of(value)
        raise ValueError(f"expected version {_VERSION}, got {shown}", f'write "version: {_VERSION}"')
    return _VERSION


def parse_rule_name(value: object) -> str:
    """A rule's name, which stands in logs, metrics and answers."""
    name = parse_some_text(value)
    if len(name) > 100 or not name.isprintable() or name != name.strip():
        raise ValueError("a rule's name is 1 to 100 printable characters without space around them", "")
    return name


def parse_agent_glob(value: object) -> Glob:
    """A glob over agents' ids."""
    text = parse_some_text(value)
    if not _AGENT.fullmatch(text):
        raise ValueError(
            f'"{text}" can be no agent\'s id', "an id has letters, digits, '.', '_' and '-'; * is a wildcard"
        )
    return text_glob(text)


def parse_host_pattern(value: object) -> HostPattern:
    """A host or a wildcard of hosts, in normal form."""
    text = parse_some_text(value)
    try:
        return HostPattern.parse(text)
    except ValueError as error:
        message, hint = error.args
    _, url, rest = text.rpartition("://")
    host, slash, _ = rest.partition("/")
    name, _, port = host.rpartition(":")
    if url or slash:
        hint = f'write only the host: "{host}"; the scheme and the path have fields of their own'
    elif name and port.isdigit():
        hint = f'write "host: {name}" and "port: {port}"'
    raise ValueError(message, hint)


def parse_one_host(value: object) -> Host:
    """A host in normal form."""
    pattern = parse_host_pattern(value)
    if pattern.depth:
        raise ValueError(f'"{pattern}": a request can be sent to one host only', "write its whole name")
    return Host.parse(pattern.name)


def parse_method(value: object) -> str:
    """A method (RFC 9110 section 9.1), in upper case and not one that is never forwarded."""
    text = parse_some_text(value)
    if "*" in text:
        raise ValueError("a method takes no wildcard", 'leave "method" out to match any')
    parse_token(text, "a method")
    if text != text.upper():
        raise ValueError(f'method "{text}" is not in upper case', f'write "{text.upper()}"')
    if text in NEVER_FORWARDED:
        raise ValueError(f"{text} is never forwarded", "remove it")
    return text


def parse_path(value: object) -> Glob:
    """A glob over paths, in normal form."""
    text = parse_some_text(value)
    if "?" in text:
        raise ValueError(f'path "{text}" holds a query', 'write it under "query"')
    return path_glob(parse_path_pattern(text))


def parse_regex(value: object) -> re2._Regexp:
    """An RE2 expression."""
    return compile_regex(parse_some_text(value))


def parse_path_to(value: object) -> str:
    r"""What a path becomes: text in which `\1` is a group."""
    text = parse_some_text(value)
    if "?" in text or "#" in text:
        raise ValueError("a path holds no query", 'write it under "rewrite.url.query"')
    if not text.isascii() or _CONTROL.search(text):
        raise ValueError("a path holds no such character", "write it percent-encoded")
    if re.search(r"\\(?![1-9])", text):
        raise ValueError("a backslash stands only before the number of a group", r"write \1 for the first group")
    return text


def parse_header_name(value: object) -> str:
    """A header that a rule may set or remove, in lower case."""
    name = parse_token(value).lower()
    if name == "host":
        raise ValueError('the header "host" follows the URL', 'write "rewrite.url.host"')
    if name in _OWN_HEADERS or name.startswith(_OWN_PREFIXES):
        raise ValueError(f'the header "{name}" is the proxy\'s own: no rule may change it', "remove it")
    return name


def parse_token(value: object, what: str = "a header name") -> str:
    """A name as HTTP knows them (RFC 9110 section 5.6.2)."""
    text = parse_text(value)
    if not _TOKEN.fullmatch(text):
        raise ValueError(f'"{text}" is not {what}', "")
    return text


def parse_matched_header(value: object) -> str:
    """A header that a rule may look at, in lower case."""
    name = parse_token(value).lower()
    if name == "host":
        raise ValueError('the header "host" always agrees with the URL', 'write "match.host"')
    if name == "upgrade":
        raise ValueError('the header "upgrade" is the proxy\'s own', 'write "match.websocket: true"')
    if not is_forwarded(name.encode()):
        raise ValueError(f'the header "{name}" is never forwarded: no request has it', "remove it")
    return name


def parse_header_value(value: object) -> str:
    """A value any header can carry (RFC 9110 section 5.5)."""
    text = parse_text(value)
    if _CONTROL.search(text) or any(ord(char) > 255 for char in text):
        raise ValueError("the value holds a character that no header can carry", "")
    return text


def parse_credential(value: object) -> str:
    """A credential's name."""
    try:
        return parse_name(parse_text(value))
    except UserError as error:
        raise ValueError(str(error), "") from None


def parse_inject_kind(value: object) -> str:
    """How a credential is added."""
    text = parse_text(value)
    if text not in INJECT_KINDS:
        hint = did_you_mean(text, INJECT_KINDS) or f"use one of {', '.join(INJECT_KINDS)}"
        raise ValueError(f'unknown kind "{text}"', hint)
    return text
