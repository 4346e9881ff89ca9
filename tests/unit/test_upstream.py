"""What is dialled was resolved, checked and pinned. The resolver asks a real name server of ours."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from ipaddress import ip_network

import dns.message
import dns.rcode
import dns.rrset
import pytest

from proxy import upstream as module
from proxy.address import Host
from proxy.parent import Parent
from proxy.reason import Reason
from proxy.settingvalue import Endpoint
from proxy.upstream import PINNED, Refused, Route, SocketAddress, Upstream, pin_connections

RECORDS = {
    "public.test": ["8.8.8.8", "2001:4860:4860::8888"],
    "private.test": ["10.0.0.5"],
    "mixed.test": ["8.8.8.8", "10.0.0.5"],
    "mixed6.test": ["8.8.8.8", "fd00::5"],
    "metadata.test": ["169.254.169.254"],
    "loopback.test": ["127.0.0.1"],
    "loopback6.test": ["::1"],
    "nothing.test": ["0.0.0.0"],
    "mapped.test": ["::ffff:10.0.0.5"],
    "nat64.test": ["64:ff9b::a00:5"],
    "empty.test": [],
}


class Nameserver(asyncio.DatagramProtocol):
    """Answers from `RECORDS`; says nothing about `silent.test`."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self.transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        (question,) = query.question
        name = question.name.to_text(omit_final_dot=True)
        if name == "silent.test":
            return
        answer = dns.message.make_response(query)
        if name not in RECORDS:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        else:
            kind = question.rdtype.name
            found = [text for text in RECORDS[name] if (":" in text) == (kind == "AAAA")]
            if found and kind in ("A", "AAAA"):
                answer.answer.append(dns.rrset.from_text_list(question.name, 1, "IN", kind, found))
        self.transport.sendto(answer.to_wire(), address)


@pytest.fixture(scope="module")
def nameserver() -> Iterator[Endpoint]:
    loop, started, ports = asyncio.new_event_loop(), threading.Event(), list[int]()

    def run() -> None:
        transport, _ = loop.run_until_complete(loop.create_datagram_endpoint(Nameserver, ("127.0.0.1", 0)))
        ports.append(transport.get_extra_info("sockname")[1])
        started.set()
        loop.run_forever()
        transport.close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    yield Endpoint(Host.parse("127.0.0.1"), ports[0])
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def ask(
    target: str,
    nameserver: Endpoint | None = None,
    *,
    connect_to: Mapping[str, str] | None = None,
    allow: Collection[str] = (),
    own: Collection[tuple[str, int]] = (),
    private: bool = False,
) -> list[SocketAddress] | Reason:
    """The addresses of `host:port`, or why there are none."""
    upstream = Upstream(
        connect_to={endpoint(key): endpoint(value) for key, value in (connect_to or {}).items()},
        nameservers=[nameserver] if nameserver else [],
        allow_addresses=[ip_network(network) for network in allow],
        own=lambda: own,
    )
    try:
        return sorted(asyncio.run(upstream.addresses(*endpoint(target), private=private)), key=by_version)
    except Refused as refused:
        return refused.reason
    finally:
        upstream.close()


def straight(*addresses: SocketAddress) -> Route:
    """A route without a parent proxy."""
    return Route(addresses, None, Host("a.test"), 443)


def by_version(address: SocketAddress) -> tuple[bool, str]:
    return ":" in address[0], address[0]


def endpoint(text: str) -> Endpoint:
    host, _, port = text.rpartition(":")
    return Endpoint(Host.parse(host), int(port))


def test_a_public_name_leads_to_all_its_addresses(nameserver: Endpoint) -> None:
    assert ask("public.test:443", nameserver) == [("8.8.8.8", 443), ("2001:4860:4860::8888", 443)]


@pytest.mark.parametrize(
    "name",
    ["private", "mixed", "mixed6", "metadata", "loopback", "loopback6", "nothing", "mapped", "nat64"],
)
def test_a_name_with_one_address_that_is_not_public_is_refused(name: str, nameserver: Endpoint) -> None:
    """Rebinding: the next look-up could answer with that one alone."""
    assert ask(f"{name}.test:443", nameserver) is Reason.PRIVATE_ADDRESS


@pytest.mark.parametrize(
    "target", ["127.0.0.1:80", "[::1]:80", "[::ffff:127.0.0.1]:80", "169.254.169.254:80", "10.0.0.5:443", "0.0.0.0:80"]
)
def test_an_address_in_the_url_must_be_public_too(target: str) -> None:
    assert ask(target) is Reason.PRIVATE_ADDRESS


def test_a_public_address_in_the_url_is_dialled() -> None:
    assert ask("8.8.8.8:443") == [("8.8.8.8", 443)]
    assert ask("[2001:4860:4860::8888]:443") == [("2001:4860:4860::8888", 443)]


def test_the_systems_resolver_is_checked_as_well() -> None:
    assert ask("localhost:80") is Reason.PRIVATE_ADDRESS
    found = ask("localhost:80", allow=["127.0.0.0/8", "::1/128"])
    assert isinstance(found, list)
    assert ("127.0.0.1", 80) in found


def test_a_network_the_operator_allows_need_not_be_public(nameserver: Endpoint) -> None:
    assert ask("private.test:443", nameserver, allow=["10.0.0.0/24"]) == [("10.0.0.5", 443)]
    assert ask("mixed.test:443", nameserver, allow=["10.0.0.0/24"]) == [
        ("10.0.0.5", 443),
        ("8.8.8.8", 443),
    ]
    assert ask("private.test:443", nameserver, allow=["10.0.1.0/24"]) is Reason.PRIVATE_ADDRESS


def test_a_mapped_address_is_judged_and_dialled_as_the_one_inside(nameserver: Endpoint) -> None:
    assert ask("mapped.test:443", nameserver, allow=["10.0.0.0/24"]) == [("10.0.0.5", 443)]
    assert ask("mapped.test:443", nameserver, allow=["10.0.0.0/24"], own=[("10.0.0.5", 443)]) is Reason.PRIVATE_ADDRESS


def test_a_private_rule_leads_only_to_the_networks_allowed(nameserver: Endpoint) -> None:
    allow = ["10.0.0.0/24"]
    assert ask("private.test:443", nameserver, allow=allow, private=True) == [("10.0.0.5", 443)]
    assert ask("public.test:443", nameserver, allow=allow, private=True) is Reason.PRIVATE_ADDRESS
    assert ask("mixed.test:443", nameserver, allow=allow, private=True) is Reason.PRIVATE_ADDRESS


def test_an_address_the_operator_wrote_is_trusted(nameserver: Endpoint) -> None:
    led = {"public.test:443": "127.0.0.1:9443", "10.0.0.5:443": "127.0.0.1:9443"}
    assert ask("public.test:443", nameserver, connect_to=led) == [("127.0.0.1", 9443)]
    assert ask("10.0.0.5:443", connect_to=led) == [("127.0.0.1", 9443)]
    assert ask("public.test:444", nameserver, connect_to=led) == [("8.8.8.8", 444), ("2001:4860:4860::8888", 444)]


def test_a_name_the_operator_wrote_is_resolved_and_checked(nameserver: Endpoint) -> None:
    assert ask("a.test:443", nameserver, connect_to={"a.test:443": "private.test:80"}) is Reason.PRIVATE_ADDRESS
    assert ask("a.test:443", nameserver, connect_to={"a.test:443": "public.test:80"}) == [
        ("8.8.8.8", 80),
        ("2001:4860:4860::8888", 80),
    ]


@pytest.mark.parametrize(
    ("own", "target"),
    [
        ("127.0.0.1", "127.0.0.1:9090"),
        ("127.0.0.1", "127.0.0.2:9090"),
        ("127.0.0.1", "[::1]:9090"),
        ("127.0.0.1", "0.0.0.0:9090"),
        ("127.0.0.1", "[::]:9090"),
        ("127.0.0.1", "127.0.0.3:9090"),
        ("10.0.0.5", "10.0.0.5:9090"),
        ("10.0.0.5", "[::ffff:10.0.0.5]:9090"),
        ("0.0.0.0", "127.0.0.1:9090"),
        ("::", "127.0.0.1:9090"),
        ("localhost", "127.0.0.1:9090"),
    ],
)
def test_nothing_leads_to_the_proxy_itself(own: str, target: str) -> None:
    """Not even what the operator allows or wrote: behind it is the admin endpoint."""
    everything = ["0.0.0.0/0", "::/0"]
    assert ask(target, allow=everything, own=[(own, 9090)]) is Reason.PRIVATE_ADDRESS
    assert ask("a.test:443", connect_to={"a.test:443": target}, own=[(own, 9090)]) is Reason.PRIVATE_ADDRESS
    other = ask(target.replace("9090", "9091"), allow=everything, own=[(own, 9090)])
    assert isinstance(other, list)


@pytest.mark.parametrize("target", ["store.internal:6379", "10.0.0.5:6379", "[::ffff:10.0.0.5]:6379"])
def test_a_store_that_is_known_by_name_is_no_upstream(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """It speaks to whoever may connect, and a private network may be allowed."""

    async def system(_: Upstream, name: str) -> list[str]:
        return {"store.internal": ["10.0.0.5"]}[name]

    monkeypatch.setattr(Upstream, "_system", system)
    assert ask(target, allow=["10.0.0.0/8"], own=[("store.internal", 6379)]) is Reason.PRIVATE_ADDRESS
    assert ask("10.0.0.6:6379", allow=["10.0.0.0/8"], own=[("store.internal", 6379)]) == [("10.0.0.6", 6379)]
    assert ask("10.0.0.5:443", allow=["10.0.0.0/8"], own=[("store.internal", 6379)]) == [("10.0.0.5", 443)]


def test_where_the_store_is_not_found_nothing_on_its_port_is_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers there could be the store."""

    async def unknown(_: Upstream, name: str) -> list[str]:
        raise OSError(name)

    monkeypatch.setattr(Upstream, "_system", unknown)
    assert ask("8.8.8.8:6379", own=[("store.internal", 6379)]) is Reason.UPSTREAM_UNREACHABLE


def test_a_store_elsewhere_leaves_this_host_alone() -> None:
    """Another server may use the port here."""
    allowed = ask("127.0.0.1:6379", allow=["127.0.0.0/8"], own=[("203.0.113.5", 6379)])
    assert allowed == [("127.0.0.1", 6379)]


def test_a_proxy_that_listens_everywhere_is_not_everywhere() -> None:
    """Another host may use the same port."""
    assert ask("8.8.8.8:8080", own=[("0.0.0.0", 8080)]) == [("8.8.8.8", 8080)]


@pytest.mark.parametrize("name", ["unknown.test", "empty.test"])
def test_a_name_without_addresses_is_unreachable(name: str, nameserver: Endpoint) -> None:
    assert ask(f"{name}:443", nameserver) is Reason.UPSTREAM_UNREACHABLE


def test_a_name_server_that_is_silent_is_not_waited_for_long(
    nameserver: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESOLVE_TIMEOUT", 0.3)
    assert ask("silent.test:443", nameserver) is Reason.UPSTREAM_TIMEOUT


# Pinning


def with_servers(count: int, story: Callable[[list[int]], Awaitable[None]]) -> None:
    """Runs `story` with the ports of so many servers, each of which tells its own; connects are pinned."""

    async def main() -> None:
        servers = [await asyncio.start_server(greet, "127.0.0.1", 0) for _ in range(count)]
        pin_connections(asyncio.get_running_loop())
        try:
            await story([server.sockets[0].getsockname()[1] for server in servers])
        finally:
            for server in servers:
                server.close()
                await server.wait_closed()

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(str(writer.get_extra_info("sockname")[1]).encode())
        writer.close()
        await writer.wait_closed()

    asyncio.run(main())


async def reached(host: str, port: int) -> int:
    """The port that a connect to `host` ends at."""
    reader, writer = await asyncio.open_connection(host, port)
    told = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(told)


async def closed_port() -> int:
    """A port that nothing listens on."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


PARENT = Parent(Endpoint(Host.parse("127.0.0.1"), 3128))


@pytest.mark.parametrize(
    ("target", "private", "expected"),
    [
        ("api.example.com:443", False, "parent"),
        ("192.0.2.1:443", False, Reason.PRIVATE_ADDRESS),
        ("8.8.8.8:443", False, "parent"),
        ("10.0.0.1:443", False, Reason.PRIVATE_ADDRESS),
        ("169.254.169.254:80", False, Reason.PRIVATE_ADDRESS),
        ("[::ffff:127.0.0.1]:80", False, Reason.PRIVATE_ADDRESS),
        ("localhost:80", False, Reason.PRIVATE_ADDRESS),
        ("a.localhost:80", False, Reason.PRIVATE_ADDRESS),
        ("metadata.google.internal:80", False, Reason.PRIVATE_ADDRESS),
        ("printer.local:80", False, Reason.PRIVATE_ADDRESS),
        ("nas.home.arpa:80", False, Reason.PRIVATE_ADDRESS),
        ("intranet:80", False, Reason.PRIVATE_ADDRESS),
        ("written.test:443", False, "10.9.9.9"),
        ("10.7.0.1:80", False, "10.7.0.1"),
        ("10.7.0.1:80", True, "10.7.0.1"),
        ("8.8.8.8:443", True, Reason.PRIVATE_ADDRESS),
    ],
)
def test_what_goes_by_the_parent(target: str, private: bool, expected: str | Reason) -> None:
    """Public names and addresses; what an operator wrote, and what a rule says is private, is dialled from here."""

    async def find() -> str | Reason:
        upstream = Upstream(
            connect_to={endpoint("written.test:443"): endpoint("10.9.9.9:443")},
            nameservers=(),
            allow_addresses=[ip_network("10.7.0.0/16")],
            own=lambda: (),
            via=PARENT,
        )
        try:
            route = await upstream.route(*endpoint(target), private=private)
        except Refused as refused:
            return refused.reason
        finally:
            upstream.close()
        if route.parent:
            assert route.addresses == [("127.0.0.1", 3128)]
            assert (route.host, route.port) == endpoint(target)
            return "parent"
        return route.addresses[0][0]

    assert asyncio.run(find()) == expected


def test_the_parent_is_not_the_proxy_itself() -> None:
    """That would be a loop."""
    upstream = Upstream(
        connect_to={}, nameservers=(), allow_addresses=(), own=lambda: [("127.0.0.1", 3128)], via=PARENT
    )
    with pytest.raises(Refused):
        asyncio.run(upstream.route(Host("api.example.com"), 443))
    upstream.close()


def test_a_connect_goes_where_it_is_pinned_to_and_nothing_is_asked_again() -> None:
    async def story(ports: list[int]) -> None:
        PINNED.set(straight(("127.0.0.1", ports[0])))
        assert await reached("rebinding.test", 443) == ports[0]
        assert await reached("192.0.2.1", 443) == ports[0], "an address in the URL is led elsewhere too"

    with_servers(1, story)


def test_the_next_address_is_tried_where_one_fails() -> None:
    async def story(ports: list[int]) -> None:
        PINNED.set(straight(("127.0.0.1", await closed_port()), ("127.0.0.1", ports[0])))
        assert await reached("a.test", 443) == ports[0]
        PINNED.set(straight(("127.0.0.1", await closed_port())))
        with pytest.raises(ConnectionRefusedError):
            await reached("a.test", 443)
        PINNED.set(straight())
        with pytest.raises(OSError, match="no address"):
            await reached("a.test", 443)

    with_servers(1, story)


def test_a_pin_holds_in_the_task_that_set_it_only() -> None:
    async def story(ports: list[int]) -> None:
        async def pinned(port: int) -> int:
            PINNED.set(straight(("127.0.0.1", port)))
            return await reached("a.test", 443)

        assert await asyncio.gather(*(asyncio.create_task(pinned(port)) for port in ports)) == ports
        assert PINNED.get() is None
        assert await reached("127.0.0.1", ports[0]) == ports[0]

    with_servers(2, story)


def test_a_refusal_names_the_rule_that_made_it() -> None:
    assert Refused(Reason.NO_RULE).rule is None
    assert str(Refused(Reason.NO_RULE, "in words")) == "no_rule"
