"""Where a decided request is dialled: names are resolved here, checked, and pinned until the connection stands."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import dns.asyncresolver
import dns.exception
import dns.nameserver

from proxy.address import Address, Host, ip_literal, is_local_name, is_public, unmapped
from proxy.parent import Parent
from proxy.policy import Decision
from proxy.reason import Reason
from proxy.settingvalue import Endpoint

RESOLVE_TIMEOUT = 5.0  # seconds

type SocketAddress = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Route:
    """The addresses to dial; with a `parent` they are its own, and it is asked to connect `host` and `port`."""

    addresses: Sequence[SocketAddress]
    parent: Parent | None
    host: Host
    port: int


# What the next connect of this task resolves to. A task that dials for a sandbox sets it; ours (store, admin) do not.
PINNED: ContextVar[Route | None] = ContextVar("pinned", default=None)


class Refused(Exception):
    """A request is refused; the decision says why."""

    def __init__(
        self, reason: Reason, detail: str = "", decision: Decision | None = None, *, retry_after: int = 5
    ) -> None:
        self.reason = reason
        self.detail = detail
        self.rule = decision.rule if decision else None
        self.limit = decision.limit if decision else ""
        self.retry_after = retry_after  # seconds
        super().__init__(reason)


class Upstream:
    """Turns a host and port into the addresses that may be dialled for it. `own` tells the listeners of this proxy and
    the servers of its store, by name or by address: nothing may lead a sandbox there."""

    def __init__(
        self,
        *,
        connect_to: Mapping[Endpoint, Endpoint],
        nameservers: Sequence[Endpoint],
        allow_addresses: Collection[IPv4Network | IPv6Network],
        own: Callable[[], Collection[tuple[str, int]]],
        via: Parent | None = None,
    ) -> None:
        self.connect_to = connect_to
        self.allow_addresses = tuple(allow_addresses)
        self.own = own
        self.via = via
        self._resolver = _resolver(nameservers) if nameservers else None
        self._threads = ThreadPoolExecutor(32, "resolve")  # getaddrinfo blocks

    async def route(self, host: Host, port: int, *, private: bool = False) -> Route:
        """How to get to a host; `private` as for `addresses`. Raises Refused."""
        parent = self.via
        if parent is None or private or (host, port) in self.connect_to or self._is_allowed(host.ip):
            return Route(await self.addresses(host, port, private=private), None, host, port)
        if host.ip:
            await self.addresses(host, port)
        elif is_local_name(host):  # it would be looked up where the parent is
            raise Refused(Reason.PRIVATE_ADDRESS)
        to_host, to_port = parent.endpoint
        found = [to_host.ip] if to_host.ip else await self._resolve(to_host.name)
        if not found or await self._leads_to_us(found, to_port):
            raise Refused(Reason.UPSTREAM_UNREACHABLE)
        return Route([(str(address), to_port) for address in found], parent, host, port)

    async def addresses(self, host: Host, port: int, *, private: bool = False) -> list[SocketAddress]:
        """The addresses to dial, all checked. `private`: a rule says that none of them may be a public one.

        Raises Refused. An address the operator wrote in `connect_to` is trusted; nothing leads to the proxy itself.
        """
        to_host, to_port = self.connect_to.get(Endpoint(host, port), (host, port))
        written = (host, port) in self.connect_to and to_host.ip is not None
        found = [to_host.ip] if to_host.ip else await self._resolve(to_host.name)
        if not found:
            raise Refused(Reason.UPSTREAM_UNREACHABLE)
        if not written and not all(self._may_dial(address, private) for address in found):
            raise Refused(Reason.PRIVATE_ADDRESS)
        if await self._leads_to_us(found, to_port):
            raise Refused(Reason.PRIVATE_ADDRESS)
        return [(str(address), to_port) for address in found]

    def _may_dial(self, address: Address, private: bool) -> bool:
        allowed = self._is_allowed(address)
        return allowed if private else allowed or is_public(address)

    def _is_allowed(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self.allow_addresses)

    async def _leads_to_us(self, found: Sequence[Address], port: int) -> bool:
        """Whether one of these is ours. A server on an address of this host may listen on all of them."""
        ours: set[Address] = set()
        for name, own_port in self.own():
            if own_port == port:
                ip = ip_literal(name)
                ours.update([unmapped(ip)] if ip else await self._found(self._system(name)))
        if not ours:
            return False
        here = any(address.is_unspecified or _is_local(address) for address in ours)
        return any(address in ours or (here and _is_here(address)) for address in found)

    async def _resolve(self, name: str) -> list[Address]:
        return await self._found(self._ask(name) if self._resolver else self._system(name))

    async def _found(self, asked: Coroutine[Any, Any, list[str]]) -> list[Address]:
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT):
                answers = await asked
        except (TimeoutError, dns.exception.Timeout):
            raise Refused(Reason.UPSTREAM_TIMEOUT) from None
        except (OSError, UnicodeError, dns.exception.DNSException):
            raise Refused(Reason.UPSTREAM_UNREACHABLE) from None
        found = [unmapped(address) for answer in answers if (address := ip_literal(answer.partition("%")[0]))]
        return list(dict.fromkeys(found))

    async def _system(self, name: str) -> list[str]:
        loop = asyncio.get_running_loop()
        infos = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        )
        return [str(info[4][0]) for info in infos]

    async def _ask(self, name: str) -> list[str]:
        assert self._resolver
        answers = await self._resolver.resolve_name(name, search=False)
        return list(answers.addresses())

    def close(self) -> None:
        """Give up look-ups that are under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _is_here(address: Address) -> bool:
    """Whether a connect to `address` stays on this host; Linux connects the unspecified one to loopback."""
    return address.is_loopback or address.is_unspecified or _is_local(address)


def _is_local(address: Address) -> bool:
    """Whether this host has `address`: only then can it be bound."""
    with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError:
            return False
    return True


def _resolver(nameservers: Sequence[Endpoint]) -> dns.asyncresolver.Resolver:
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = [dns.nameserver.Do53Nameserver(host.name, port) for host, port in nameservers]
    resolver.lifetime = RESOLVE_TIMEOUT
    return resolver


def pin_connections(loop: asyncio.AbstractEventLoop) -> None:
    """Make connects of `loop` go to `PINNED` where it is set: nothing is asked again between check and dial."""
    original = loop.create_connection

    async def create_connection(factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        route = PINNED.get()
        if route is None:
            return await original(factory, host, port, **options)
        failure = OSError("no address")
        for address in route.addresses:
            try:
                if route.parent:
                    sock = await route.parent.open(address, route.host, route.port)
                    return await original(factory, sock=sock)
                return await original(factory, *address, **options)
            except OSError as error:
                failure = error
        raise failure

    loop.create_connection = create_connection  # type: ignore[method-assign, assignment]
