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
from proxy.yamltree import kind_of

_STORES = ("redis", "rediss", "redis+sentinel", "redis+cluster")
MAX_WORKERS = 256
_LATER = "not available in this version"


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


@dataclass(frozen=True, slots=True)
class Listener:
    """One way in; `address` is as the operator wrote it, `agent` the one agent it belongs to, or None for any."""

    address: str
    host: str
    port: int
    agent: str | None = None
    scheme: Literal["regular", "transparent", "unix", "tls"] = "regular"


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


def parse_listener(value: object) -> Listener:
    """One way in: an address, or an address bound to an agent. Raises ValueError(message[, hint])."""
    agent: str | None = None
    address = value
    if isinstance(value, dict):
        unknown = sorted(value.keys() - {"address", "agent"})
        if unknown or "address" not in value:
            message = f'unknown field "{unknown[0]}"' if unknown else 'missing field "address"'
            raise ValueError(message, 'write {address: "127.0.0.1:8081", agent: coder-1}')
        address = value["address"]
        agent = parse_agent_id(parse_text(value["agent"], "an agent id")) if value.get("agent") is not None else None
    text = parse_text(address, "an address such as 127.0.0.1:8080")
    for mark, scheme in (("transparent@", "transparent"), ("unix:", "unix"), ("tls://", "tls")):
        if text.startswith(mark):
            if scheme != "unix":
                parse_bind(text.removeprefix(mark))
            raise ValueError(f'"{text}": {scheme} listeners are {_LATER}', 'write "127.0.0.1:8080"')
    host, port = parse_bind(text)
    return Listener(text, host.name, port, agent)


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


def not_yet(value: object) -> None:
    """Refuses anything but null, for a setting of a later version. Raises ValueError(message, hint)."""
    if value is not None:
        raise ValueError(_LATER, "remove it, or write null")


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
