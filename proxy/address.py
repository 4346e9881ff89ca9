"""Hosts, the patterns rules write for them, and which addresses are public. No name is ever resolved here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import idna

type Address = IPv4Address | IPv6Address

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052
_UNICAST6 = IPv6Network("2000::/3")  # all that IANA has assigned for global unicast
_SPECIAL: tuple[IPv4Network | IPv6Network, ...] = (  # not for dialling, whatever this Python's own tables say
    IPv4Network("192.0.0.0/24"),  # protocol assignments (RFC 6890)
    IPv4Network("192.88.99.0/24"),  # 6to4 relays, deprecated (RFC 7526)
    IPv4Network("168.63.129.16/32"),  # Azure gives every machine its metadata there
    IPv6Network("2001::/23"),  # protocol assignments (RFC 2928), among them Teredo and ORCHID
    IPv6Network("3fff::/20"),  # documentation (RFC 9637)
)
_LOCAL = (".localhost", ".local", ".internal", ".home.arpa")
_MAX_TEXT = 1024  # characters: a name has 253, but characters that UTS 46 maps to nothing may stand between them
_ASCII_DOTS = str.maketrans("\u3002\uff0e\uff61", "...")  # UTS 46 section 2.3: other full stops


@dataclass(frozen=True, slots=True)
class Host:
    """A host in the one form rules are matched in: lower case, A-labels, no trailing dot, addresses canonical."""

    name: str
    ip: Address | None = None

    @staticmethod
    @lru_cache(maxsize=2048)
    def parse(text: str) -> Host:
        """The normal form of a host as a request spells it.

        Raises ValueError for what is no host, and for numbers that some resolvers read as an IPv4 address (RFC 3986
        section 7.4: `0x7f.1`, `2130706433`).
        """
        if len(text) > _MAX_TEXT:
            raise ValueError("a host name is not so long")
        if text.startswith("[") and text.endswith("]"):
            return _address(IPv6Address(_without_zone(text[1:-1])))
        if ":" in text:
            return _address(IPv6Address(_without_zone(text)))
        name = text.translate(_ASCII_DOTS).removesuffix(".")
        if not name.isascii():
            try:
                name = idna.encode(name, uts46=True).decode("ascii")
            except idna.IDNAError as error:
                raise ValueError(f"{text!r} is not a host name: {error}") from None
        name = name.lower()
        labels = name.split(".")
        if _NUMERIC.fullmatch(labels[-1]):
            return _address(IPv4Address(name))
        if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
            raise ValueError(f"{text!r} is not a host name")
        return Host(name)

    def __str__(self) -> str:
        return f"[{self.name}]" if isinstance(self.ip, IPv6Address) else self.name


def _address(ip: Address) -> Host:
    ip = unmapped(ip)
    return Host(str(ip), ip)


def _without_zone(text: str) -> str:
    if "%" in text:
        raise ValueError("an address with a zone is not accepted")
    return text


@dataclass(frozen=True, slots=True)
class HostPattern:
    """`example.com`, `*.example.com` (one label), `**.example.com` (any depth, never the apex) or `**` (any host).

    `depth` is 0 for an exact host, 1 for one label, 2 for any depth; `name` is what stands after the wildcard.
    """

    name: str
    depth: int = 0

    @staticmethod
    def parse(text: str) -> HostPattern:
        """The pattern, which must be written in normal form.

        Raises ValueError(message, hint): the hint shows the right spelling.
        """
        if text == "**":
            return HostPattern("", 2)
        stars, dot, rest = text.partition(".")
        depth = {"*": 1, "**": 2}.get(stars, 0) if dot else 0
        suffix = rest if depth else text
        try:
            host = Host.parse(suffix)
        except ValueError:
            hint = 'a wildcard is written "*.example.com", "**.example.com" or "**"' if "*" in text else ""
            raise ValueError(f'"{text}" is not a host', hint) from None
        if depth and host.ip:
            raise ValueError(f'"{text}": an address takes no wildcard', f'write "{host.name}"')
        if suffix not in (host.name, str(host)):
            spelling = f"{stars}.{host.name}" if depth else host.name
            raise ValueError(f'host "{text}" is not in normal form', f'write "{spelling}"')
        return HostPattern(host.name, depth)

    def matches(self, host: Host) -> bool:
        """Whether `host` is one of the pattern's."""
        if not self.depth:
            return host.name == self.name
        if not self.name:
            return True
        head, dot, tail = host.name.partition(".")
        if self.depth == 1:
            return bool(head and dot) and tail == self.name and host.ip is None
        return host.name.endswith("." + self.name) and host.ip is None

    def __str__(self) -> str:
        if not self.name:
            return "**"
        return ("", "*.", "**.")[self.depth] + self.name


def unmapped(ip: Address) -> Address:
    """The IPv4 address in an IPv4-mapped one (RFC 4291 section 2.5.5.2): one address, one spelling."""
    return (ip.ipv4_mapped if isinstance(ip, IPv6Address) else None) or ip


def is_public(ip: Address) -> bool:
    """Whether `ip` may be dialled because DNS said so: globally reachable unicast (IANA special-purpose registries).

    An IPv4 address inside an IPv6 one (mapped RFC 4291, 6to4 RFC 3056, NAT64 RFC 6052) is judged as what it leads to.
    """
    ip = unmapped(ip)
    if isinstance(ip, IPv6Address):
        inner = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.sixtofour
        if inner:
            return is_public(inner)
        if ip not in _UNICAST6:
            return False
    if any(ip in network for network in _SPECIAL):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def is_local_name(host: Host) -> bool:
    """Whether a name means something else on each network: one label, or below a name kept for that (RFC 6761
    section 6.3, RFC 6762, RFC 8375, ICANN's `internal`)."""
    return "." not in host.name or host.name.endswith(_LOCAL)


def parse_authority(text: str) -> tuple[Host, int]:
    """`host:port` with a port, as in a CONNECT target (RFC 9110 section 7.1).

    Raises ValueError.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise ValueError(f"{text!r} is not host:port")
    if ":" in host and not host.startswith("["):
        raise ValueError(f"{text!r}: an IPv6 address needs brackets")
    return Host.parse(host), int(port)


@lru_cache(maxsize=4096)
def ip_literal(text: str) -> Address | None:
    """The address `text` spells canonically, or None for a name."""
    try:
        return ip_address(text)
    except ValueError:
        return None
