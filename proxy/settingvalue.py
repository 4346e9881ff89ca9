"""The values of settings: text as an operator writes it to what the proxy works with. Opens nothing."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from proxy.address import Host
from proxy.agent import parse_agent_id
from proxy.cpus import usable_cpus
from proxy.proof import AgentPattern
from proxy.yamltree import kind_of

_STORES = ("redis", "rediss", "redis+sentinel", "redis+cluster")
MAX_WORKERS = 256
NOBODY = 65534  # what the kernel tells of a user who is not mapped into our user namespace


class Endpoint(NamedTuple):
    """A host and a port, 0 only where the kernel shall choose one; equal to the plain pair."""

    host: Host
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class StoreUrl:
    """Where the store is; its text hides the password, only `reveal()` tells it."""

    __slots__ = ("_url",)

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def embedded(self) -> bool:
        """Whether the proxy starts a store of its own."""
        return self._url == "embedded"

    def reveal(self) -> str:
        """The URL with its password, for the store's client only."""
        return self._url

    def __str__(self) -> str:
        if self.embedded:
            return self._url
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def __repr__(self) -> str:
        return f"StoreUrl({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreUrl) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)


type ListenerScheme = Literal["regular", "transparent", "unix", "tls"]


@dataclass(frozen=True, slots=True)
class Listener:
    """One way in; `address` is as the operator wrote it, `agent` the one agent it belongs to, or None for any.

    A unix socket has a `path` instead of host and port, with the permissions `mode`, and a `group` where not our own;
    `{agent}` in the path stands for one socket each.
    """

    address: str
    host: str
    port: int
    agent: str | None = None
    scheme: ListenerScheme = "regular"
    path: str = ""
    mode: int = 0o600
    group: str = ""
    client_certificate: Literal["optional", "required"] = "optional"  # tls, where identity.mtls is set

    @property
    def per_agent(self) -> AgentPattern | None:
        """The path of each agent's own socket, where it is a pattern."""
        return AgentPattern.parse(self.path) if "{agent}" in self.path else None


def parse_text(value: object, what: str = "text") -> str:
    """Text, not a number or a list. Raises ValueError(message[, hint])."""
    if not isinstance(value, str):
        raise ValueError(f"expected {what}, got {kind_of(value)}")
    return value


def parse_endpoint(value: object, least_port: int = 1) -> Endpoint:
    """`host:port` with the port at least `least_port`. Raises ValueError(message[, hint])."""
    text = parse_text(value, "host:port")
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or not least_port <= int(port) < 65536:
        raise ValueError(f'"{text}" is not host:port', f"the port is a number from {least_port} to 65535")
    if not host:
        raise ValueError(f'"{text}" has no host', f'write "127.0.0.1:{port}", or "0.0.0.0:{port}" for every interface')
    if ":" in host and not host.startswith("["):
        raise ValueError(f'"{text}": an IPv6 address needs brackets', 'write "[::1]:8080"')
    try:
        return Endpoint(Host.parse(host), int(port))
    except ValueError:
        raise ValueError(f'"{host}" is not a host', "write a host name or an IP address") from None


def parse_bind(value: object) -> Endpoint:
    """An address to listen on; port 0 leaves the choice to the kernel. Raises ValueError(message[, hint])."""
    return parse_endpoint(value, least_port=0)


def parse_nameserver(value: object) -> Endpoint:
    """`ip:port` of a DNS server. Raises ValueError(message[, hint])."""
    endpoint = parse_endpoint(value)
    if endpoint.host.ip is None:
        raise ValueError(f'"{value}" is not ip:port', "a nameserver is given by its IP address")
    return endpoint


_MARKS: tuple[tuple[str, ListenerScheme], ...] = (("transparent@", "transparent"), ("unix:", "unix"), ("tls://", "tls"))
_OPTIONS: dict[ListenerScheme, tuple[str, ...]] = {"unix": ("mode", "group"), "tls": ("client_certificate",)}
_MODES = {"0600": 0o600, "0660": 0o660, "0666": 0o666}
_LONGEST_PATH = 103  # bytes: of the 107 in sun_path on Linux some are for a draft's name
_LONGEST_AGENT = 63


def parse_listener(value: object) -> Listener:
    """One way in: an address, or a mapping with more about it. Raises ValueError(message[, hint])."""
    options = dict(value) if isinstance(value, dict) else {"address": value}
    if "address" not in options:
        raise ValueError('missing field "address"', 'write {address: "127.0.0.1:8081", agent: coder-1}')
    text = parse_text(options.pop("address"), "an address such as 127.0.0.1:8080")
    mark, scheme = next(((mark, scheme) for mark, scheme in _MARKS if text.startswith(mark)), ("", "regular"))
    unknown = sorted(options.keys() - {"agent", *_OPTIONS.get(scheme, ())})
    if unknown:
        takes = ", ".join(("address", "agent", *_OPTIONS.get(scheme, ())))
        raise ValueError(f'unknown field "{unknown[0]}"', f"a {scheme} listener takes {takes}")
    agent = options.get("agent")
    agent = parse_agent_id(parse_text(agent, "an agent id")) if agent is not None else None
    place = text.removeprefix(mark)
    if scheme == "unix":
        return _unix_listener(text, place, agent, options)
    host, port = parse_bind(place)
    return Listener(text, host.name, port, agent, scheme, client_certificate=_certificate(options))


def _unix_listener(text: str, path: str, agent: str | None, options: dict[str, object]) -> Listener:
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f'"{text}" has no absolute path', 'write "unix:/run/sallyport/{agent}.sock"')
    mode = str(options.get("mode") or "0600")
    if mode not in _MODES:
        raise ValueError(f'mode "{mode}" is not 0600, 0660 or 0666', 'write mode: "0660", in quotes')
    listener = Listener(text, "", 0, agent, "unix", path, _MODES[mode], parse_text(options.get("group") or ""))
    pattern = listener.per_agent
    if pattern and agent:
        raise ValueError(f'"{text}" has a socket for each agent', "leave agent: out")
    if pattern and "/" in pattern.after:
        raise ValueError(f'"{text}": {{agent}} must be in the file\'s name', "write /run/sallyport/{agent}.sock")
    if len((pattern.fill("a" * _LONGEST_AGENT) if pattern else path).encode()) > _LONGEST_PATH:
        raise ValueError(f'"{text}" is too long for a socket', f"a path has {_LONGEST_PATH} bytes, an id up to 63")
    return listener


def _certificate(options: dict[str, object]) -> Literal["optional", "required"]:
    match options.get("client_certificate", "optional"):
        case "required":
            return "required"
        case "optional":
            return "optional"
    raise ValueError("client_certificate is optional or required", "write required, and set identity.mtls")


def parse_path(value: object) -> Path:
    """A path that is not empty. Raises ValueError(message[, hint])."""
    text = parse_text(value, "a path")
    if not text or "\0" in text:
        raise ValueError("expected a path, got empty text")
    return Path(text)


def parse_file(value: object) -> Path:
    """A file that is there. Raises ValueError(message[, hint])."""
    path = parse_path(value)
    if not path.is_file():
        raise ValueError(f"no such file: {path}", "give the path of a PEM file")
    return path


def parse_store(value: object) -> StoreUrl:
    """`embedded`, or a URL of a Redis protocol. Raises ValueError(message[, hint])."""
    text = parse_text(value)
    hint = "write embedded, or redis://:password@host:6379/0"
    if text == "embedded":
        return StoreUrl(text)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _STORES:
        raise ValueError(f"the store is embedded or a URL beginning with {', '.join(f'{s}://' for s in _STORES)}", hint)
    try:
        netloc = urlsplit(text).netloc if text.isprintable() and " " not in text else ""
        servers = [parse_endpoint(server if _has_port(server) else f"{server}:6379") for server in _servers(netloc)]
    except ValueError:
        servers = []
    # A raw "/", "?" or "#" in a password ends the host part early, and the rest would be shown as path.
    if not servers or "@" in rest.removeprefix(netloc):
        raise ValueError("the store's URL is not well-formed", f'{hint}; percent-encode "/?#@" in the password')
    return StoreUrl(text)


def _servers(netloc: str) -> list[str]:
    return netloc.rpartition("@")[2].split(",")


def _has_port(server: str) -> bool:
    return ":" in server.rpartition("]")[2]


def parse_network(value: object) -> IPv4Network | IPv6Network:
    """A CIDR without host bits. Raises ValueError(message[, hint])."""
    text = parse_text(value, "a network")
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        right = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'"{text}" is not a network', 'write it as "10.1.2.0/24"') from None
    raise ValueError(f'"{text}" has bits set outside its mask', f'write "{right}"')


def parse_jwks(value: object) -> Path | str:
    """A file that is there, or an https URL. Raises ValueError(message[, hint])."""
    text = parse_text(value, "a file or a URL")
    if "://" not in text:
        path = parse_path(text)
        if not path.is_file():
            raise ValueError(f"no such file: {path}", "give a JWK Set, or its https:// URL")
        return path
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname or "@" in parts.netloc:
        raise ValueError("the keys' URL must begin with https:// and hold no password", "or give a file")
    return text


def parse_pattern(value: object) -> AgentPattern | None:
    """A text with `{agent}` in it once, or nothing. Raises ValueError(message[, hint])."""
    return None if value is None else AgentPattern.parse(parse_text(value))


def parse_uid(value: object) -> int:
    """A user's number. Raises ValueError(message[, hint])."""
    text = str(value)
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 2**32 - 1:
        raise ValueError(f'"{text}" is not a user\'s number', "write it as `id -u` prints it, such as 1001")
    if int(text) == NOBODY:
        raise ValueError(f"{NOBODY} is every user of a sandbox that this host has no number for", "give it a real one")
    return int(text)


def parse_agent(value: object) -> str:
    """An agent's id. Raises ValueError(message[, hint])."""
    return parse_agent_id(parse_text(value, "an agent id"))


def distinct(parse: typing.Callable[[object], object]) -> typing.Callable[[object], object]:
    """A validator that refuses two spellings of one key: the later would silently win."""

    def check(value: object) -> object:
        seen: dict[object, str] = {}
        for key in value if isinstance(value, dict) else ():
            try:
                first = seen.setdefault(parse(key), key)
            except ValueError:
                continue  # told at the key itself
            if first != key:
                raise ValueError(f'"{key}" is the same as "{first}"', "remove one of them")
        return value

    return check


def parse_workers(value: object) -> int:
    """How many worker processes; `auto` is one for each CPU we may use. Raises ValueError(message, hint)."""
    if value == "auto":
        return min(usable_cpus(), MAX_WORKERS)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_WORKERS:
        got = str(value) if isinstance(value, int) else kind_of(value)
        raise ValueError(
            f"expected a number of workers from 1 to {MAX_WORKERS}, or auto, got {got}", "write 2, or auto"
        )
    return value
