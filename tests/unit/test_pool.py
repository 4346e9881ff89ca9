"""Upstream connections that are kept: only what is sound and nobody else's, dialled and proven as they should be."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from proxy import poller as poller_module
from proxy import pool as module
from proxy.address import Host
from proxy.poller import Poller
from proxy.pool import IDLE, Place, Pool, UpstreamConnection
from proxy.reason import Reason
from proxy.settingvalue import Endpoint
from proxy.upstream import Refused, Route, SocketAddress, Upstream
from tests.strands import play, result, swept, turns, until

SECONDS = 10.0
HOST = Host("api.test")
REQUEST = b"GET / HTTP/1.1\r\n\r\n"
CA = trustme.CA()


class Origin:
    """A TLS server on the test's own loop that says `ok` to every line that ends a request."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.context = context
        self.resumed: list[bool] = []
        self.names: list[str | None] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.port = 0
        if context:
            context.sni_callback = lambda _, name, __: self.names.append(name)

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[Origin]:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # handshakes that are meant to fail
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self.writers:
                writer.transport.abort()
            await turns()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        tls = writer.get_extra_info("ssl_object")
        self.resumed.append(bool(tls and tls.session_reused))
        with contextlib.suppress(OSError):
            while await reader.readline() and await reader.readline():
                writer.write(b"ok")


def origin_context(
    *names: str, ca: trustme.CA = CA, most: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = most
    context.set_alpn_protocols(["h2", "http/1.1"])
    ca.issue_cert(*(names or ("api.test", "127.0.0.1"))).configure_cert(context)
    return context


@pytest.fixture
def trust(tmp_path: Path) -> list[Path]:
    """What an operator lists in `upstream.trust`."""
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return [tmp_path / "ca.pem"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of pollers, looked at often; set `clock[0]`."""
    monkeypatch.setattr(poller_module, "_SWEEP", 0.001)
    return [1000.0]


def led(port: int) -> Upstream:
    """Everything on ports 443 and 80 is led to a port of this machine."""
    there = Endpoint(Host.parse("127.0.0.1"), port)
    names = (HOST, Host("other.test"), Host.parse("127.0.0.1"))
    return Upstream(
        connect_to={Endpoint(name, known): there for name in names for known in (443, 80)},
        nameservers=(),
        allow_addresses=(),
        own=lambda: (),
    )


def straight(*addresses: SocketAddress) -> Route:
    """A route without a parent proxy."""
    return Route(addresses, None, HOST, 443)


def place(host: Host = HOST, *, tls: bool = True, owner: str = "") -> Place:
    return Place(host, 443 if tls else 80, tls, False, owner)


async def used(pool: Pool, where: Place, **options: Any) -> UpstreamConnection:
    """A connection that has carried one exchange and was not released yet."""

    async def exchange() -> UpstreamConnection:
        connection = await pool.acquire(where, **options)
        await connection.channel.send(REQUEST, SECONDS)
        assert await connection.channel.recv(SECONDS) == b"ok"
        return connection

    return await result(exchange())


# Keeping


@pytest.mark.parametrize("tls", [True, False])
def test_a_connection_is_used_again(trust: list[Path], tls: bool) -> None:
    async def scene(poller: Poller) -> None:
        async with Origin(origin_context() if tls else None).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            first = await used(pool, place(tls=tls))
            assert not first.used
            for _ in range(3):
                pool.release(first)
                assert await used(pool, place(tls=tls)) is first
            assert first.used
            assert first.server.peername == ("127.0.0.1", origin.port)
            assert len(origin.writers) == 1

    play(scene)


def test_the_one_used_last_is_taken_first(trust: list[Path]) -> None:
    """The others may then become too old."""

    async def scene(poller: Poller) -> None:
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            first, second, third = [await used(pool, place()) for _ in range(3)]
            for connection in (second, first, third):
                pool.release(connection)
            assert [await used(pool, place()) for _ in range(3)] == [third, first, second]

    play(scene)


@pytest.mark.parametrize(
    "other", [place(Host("other.test")), place(owner="coder-1"), place(tls=False), place()._replace(private=True)]
)
def test_places_share_nothing(trust: list[Path], other: Place) -> None:
    async def scene(poller: Poller) -> None:
        async with Origin(origin_context("api.test", "other.test")).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            kept = await used(pool, place())
            pool.release(kept)
            fresh = pool.acquire(other)
            assert await (result(fresh) if not other.tls else used(pool, other)) is not kept
            fresh.close()
            assert not kept.channel.closed

    play(scene)


def test_a_fresh_one_can_be_asked_for(trust: list[Path]) -> None:
    """What is tried again is not tried on another connection that may be closing too."""

    async def scene(poller: Poller) -> None:
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            kept = await used(pool, place())
            pool.release(kept)
            fresh = await used(pool, place(), fresh=True)
            assert fresh is not kept
            assert not fresh.used
            assert await used(pool, place()) is kept

    play(scene)


def test_only_so_many_are_kept_for_a_place(trust: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IDLE_EACH", 2)

    async def scene(poller: Poller) -> None:
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            connections = [await used(pool, place()) for _ in range(3)]
            for connection in connections:
                pool.release(connection)
            assert [connection.channel.closed for connection in connections] == [False, False, True]

    play(scene)


def test_only_so_many_are_kept_in_all(trust: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those of all places the oldest goes."""
    monkeypatch.setattr(module, "MAX_IDLE", 2)

    async def scene(poller: Poller) -> None:
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            connections = [await used(pool, place(owner=str(number))) for number in range(3)]
            for number in (1, 0, 2):
                pool.release(connections[number])
            assert [connection.channel.closed for connection in connections] == [False, True, False]
            assert await used(pool, place(owner="0")) is connections[0]

    play(scene)


def test_one_that_was_idle_too_long_is_not_used(trust: list[Path], clock: list[float]) -> None:
    """The upstream may be about to close it."""

    async def scene(poller: Poller) -> None:
        poller.now = lambda: clock[0]
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            first, second = await used(pool, place()), await used(pool, place())
            pool.release(first)
            clock[0] += IDLE / 2
            pool.release(second)
            clock[0] += IDLE / 2
            assert await used(pool, place()) is second
            assert await used(pool, place()) is not first
            assert first.channel.closed

    play(scene)


def test_nor_is_it_kept_for_ever_where_nobody_asks_again(trust: list[Path], clock: list[float]) -> None:
    async def scene(poller: Poller) -> None:
        poller.now = lambda: clock[0]
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            old, other = await used(pool, place()), await used(pool, place(owner="coder-1"))
            pool.release(old)
            clock[0] += IDLE
            pool.release(other)
            assert old.channel.closed
            assert not other.channel.closed

    play(scene)


def test_the_end_of_a_pool_closes_what_is_idle(trust: list[Path]) -> None:
    async def scene(poller: Poller) -> None:
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            idle, busy = await used(pool, place()), await used(pool, place())
            pool.release(idle)
            pool.close()
            assert idle.channel.closed
            assert not busy.channel.closed

    play(scene)


# What is not kept


def test_what_the_upstream_closes_is_forgotten(trust: list[Path]) -> None:
    async def scene(poller: Poller) -> None:
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            connections = [await used(pool, place()) for _ in range(2)]
            for connection in connections:
                pool.release(connection)
            origin.writers[1].close()
            await until(lambda: connections[1].channel.closed)
            assert await used(pool, place()) is connections[0]

    play(scene)


def accepted(listening: socket.socket, connection: UpstreamConnection) -> socket.socket:
    """The other end of a plain connection."""
    peer, address = listening.accept()
    assert address == connection.channel.sock.getsockname()
    return peer


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"])
@pytest.mark.parametrize("looks", [True, False])
def test_what_closed_or_spoke_unasked_is_not_used(says: bytes, looks: bool) -> None:
    """Though the poller did not look meanwhile. What it said would be the answer to somebody else's request."""

    async def scene(poller: Poller) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            pool = Pool(poller, led(listening.getsockname()[1]).route, ())
            connection = await result(pool.acquire(place(tls=False)))
            with accepted(listening, connection) as peer:
                pool.release(connection)
                if says:
                    peer.send(says)
                else:
                    peer.close()
                if looks:
                    await turns()
                    assert connection.channel.closed
                assert await result(pool.acquire(place(tls=False))) is not connection
                assert connection.channel.closed

    play(scene)


def test_what_hung_up_during_the_exchange_is_not_kept() -> None:
    """The kernel tells of it only once, and then somebody was reading."""

    async def scene(poller: Poller) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            pool = Pool(poller, led(listening.getsockname()[1]).route, ())
            connection = await result(pool.acquire(place(tls=False)))
            answer = asyncio.create_task(result(connection.channel.recv(SECONDS)))
            await turns()
            with accepted(listening, connection) as peer:
                peer.send(b"ok")
            assert await answer == b"ok"
            pool.release(connection)
            assert connection.channel.closed

    play(scene)


def test_what_has_bytes_left_is_not_kept(trust: list[Path]) -> None:
    """An answer that was longer than it said."""

    async def scene(poller: Poller) -> None:
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            connection = await used(pool, place())
            connection.buffer += b"x"
            pool.release(connection)
            assert connection.channel.closed

    play(scene)


def test_session_tickets_do_not_end_a_kept_connection(trust: list[Path]) -> None:
    """A TLS 1.3 server sends them when it likes."""

    async def scene(poller: Poller) -> None:
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            connection = await result(pool.acquire(place()))
            pool.release(connection)
            await until(lambda: bool(origin.writers))
            await turns()
            assert await used(pool, place()) is connection

    play(scene)


# TLS


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_resumed_for_the_same_place_alone(trust: list[Path], most: ssl.TLSVersion) -> None:
    async def scene(poller: Poller) -> None:
        async with Origin(origin_context(most=most)).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            for _ in range(3):
                connection = await used(pool, place())
                pool.release(connection)
                pool.close()
            await used(pool, place(owner="coder-1"))
            assert origin.resumed == [False, True, True, False]

    play(scene)


def test_an_upstream_that_forgot_the_session_is_no_problem(trust: list[Path]) -> None:
    """It was started anew, with other keys for its tickets."""

    async def scene(poller: Poller) -> None:
        async with Origin(origin_context()).serve() as first, Origin(origin_context()).serve() as second:
            ports = [first.port, second.port]

            async def resolve(*_: Any, **__: Any) -> Route:
                return straight(("127.0.0.1", ports[0]))

            pool = Pool(poller, resolve, trust)
            pool.release(await used(pool, place()))
            pool.close()
            ports.reverse()
            await used(pool, place())
            assert second.resumed == [False]

    play(scene)


def test_the_name_is_told_and_http_1_asked_for(trust: list[Path]) -> None:
    """An address is no server name (RFC 6066 section 3), but the certificate must be for it."""

    async def scene(poller: Poller) -> None:
        async with Origin(origin_context()).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            connection = await used(pool, place())
            assert connection.channel.tls
            assert connection.channel.tls.selected_alpn_protocol() == "http/1.1"
            await used(pool, place(Host.parse("127.0.0.1")))
            assert origin.names == ["api.test", None]

    play(scene)


def old_fashioned(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A CA, and an upstream's leaf of it, without key usage and key identifiers."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, issuer: str, of: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(of.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = certificate("Old CA", "Old CA", ca_key).add_extension(x509.BasicConstraints(True, None), critical=False)
    leaf = certificate("api.test", "Old CA", key).add_extension(
        x509.SubjectAlternativeName([x509.DNSName("api.test")]), critical=False
    )
    pem = serialization.Encoding.PEM
    (folder / "old.pem").write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "leaf.pem").write_bytes(
        leaf.sign(ca_key, hashes.SHA256()).public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "leaf.pem")
    return folder / "old.pem", context


def test_an_old_fashioned_ca_that_the_operator_lists_is_trusted(tmp_path: Path) -> None:
    """Python's default context is stricter than mitmproxy's stack; both lanes take the same chains."""
    ca, context = old_fashioned(tmp_path)

    async def scene(poller: Poller) -> None:
        async with Origin(context).serve() as origin:
            await used(Pool(poller, led(origin.port).route, [ca]), place())

    play(scene)


def test_one_that_is_not_listed_is_not(tmp_path: Path, trust: list[Path]) -> None:
    _, context = old_fashioned(tmp_path)
    assert_refused(context, trust, Reason.UPSTREAM_TLS)


def assert_refused(context: ssl.SSLContext | None, trust: list[Path], reason: Reason) -> None:
    async def scene(poller: Poller) -> None:
        async with Origin(context).serve() as origin:
            pool = Pool(poller, led(origin.port).route, trust)
            with pytest.raises(Refused) as caught:
                await result(pool.acquire(place()))
            assert caught.value.reason is reason

    play(scene)


@pytest.mark.parametrize("name", ["other.test", "*.api.test", "*.test.api.test", "API.test.evil.test", "127.0.0.1"])
def test_a_certificate_for_another_name_is_refused(trust: list[Path], name: str) -> None:
    assert_refused(origin_context(name), trust, Reason.UPSTREAM_TLS)


def test_a_name_in_the_subject_alone_is_refused(trust: list[Path]) -> None:
    """RFC 9525 section 2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("other.test", common_name="api.test").configure_cert(context)
    assert_refused(context, trust, Reason.UPSTREAM_TLS)


def test_a_ca_that_nobody_listed_is_refused(trust: list[Path]) -> None:
    assert_refused(origin_context(ca=trustme.CA()), trust, Reason.UPSTREAM_TLS)


def test_a_certificate_that_is_over_is_refused(trust: list[Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    over = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    CA.issue_cert("api.test", not_after=over).configure_cert(context)
    assert_refused(context, trust, Reason.UPSTREAM_TLS)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_an_old_tls_is_refused(trust: list[Path]) -> None:
    context = origin_context()
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    assert_refused(context, trust, Reason.UPSTREAM_TLS)


def talkative(answer: bytes | None) -> Any:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if answer is None:
            await reader.read()
        writer.write(answer or b"")
        await writer.drain()
        writer.close()

    return serve


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28", b"\x00" * 99])
def test_what_speaks_no_tls_is_refused(trust: list[Path], answer: bytes) -> None:
    async def scene(poller: Poller) -> None:
        server = await asyncio.start_server(talkative(answer), "127.0.0.1", 0)
        async with server:
            pool = Pool(poller, led(server.sockets[0].getsockname()[1]).route, trust)
            with pytest.raises(Refused) as caught:
                await result(pool.acquire(place()))
            assert caught.value.reason is Reason.UPSTREAM_TLS
            await turns()

    play(scene)


# Dialling


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_a_closed_port_is_unreachable() -> None:
    async def scene(poller: Poller) -> None:
        with pytest.raises(Refused) as caught:
            await result(Pool(poller, led(closed_port()).route, ()).acquire(place()))
        assert caught.value.reason is Reason.UPSTREAM_UNREACHABLE

    play(scene)


@pytest.mark.parametrize("address", ["255.255.255.255", "fe80::1", "ff02::1"])
def test_so_is_an_address_that_cannot_be_dialled(address: str) -> None:
    """`connect` fails at once, and the kernel calls the socket writable."""

    async def resolve(*_: Any, **__: Any) -> Route:
        return straight((address, 443))

    async def scene(poller: Poller) -> None:
        for tls in (True, False):
            with pytest.raises(Refused) as caught:
                await result(Pool(poller, resolve, ()).acquire(place(tls=tls)))
            assert caught.value.reason is Reason.UPSTREAM_UNREACHABLE

    play(scene)


def test_the_next_address_is_tried(trust: list[Path]) -> None:
    async def scene(poller: Poller) -> None:
        async with Origin(origin_context("other.test")).serve() as wrong, Origin(origin_context()).serve() as right:
            ports = [closed_port(), wrong.port, right.port]

            async def resolve(*_: Any, **__: Any) -> Route:
                return straight(*[("127.0.0.1", port) for port in ports])

            connection = await used(Pool(poller, resolve, trust), place())
            assert connection.server.peername == ("127.0.0.1", right.port)

    play(scene)


def test_what_the_resolver_refuses_is_refused_for_its_reason() -> None:
    """An address that is not public was answered by DNS."""

    async def scene(poller: Poller) -> None:
        upstream = Upstream(connect_to={}, nameservers=(), allow_addresses=(), own=lambda: ())
        with pytest.raises(Refused) as caught:
            await result(Pool(poller, upstream.route, ()).acquire(place(Host.parse("127.0.0.1"))))
        assert caught.value.reason is Reason.PRIVATE_ADDRESS

    play(scene)


async def timed_out(poller: Poller, pool: Pool, clock: list[float]) -> None:
    poller.now = lambda: clock[0]
    asked = asyncio.create_task(result(pool.acquire(place())))
    await swept(poller)
    assert not asked.done()
    clock[0] += module.CONNECT_TIMEOUT
    with pytest.raises(Refused) as caught:
        await asked
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT


def test_a_connect_that_lasts_too_long_ends(clock: list[float]) -> None:
    """The backlog of the listener is full, so that nothing answers."""

    async def scene(poller: Poller) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, contextlib.ExitStack() as stack:
            for _ in range(4):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(listening.getsockname())
            await turns()
            await timed_out(poller, Pool(poller, led(listening.getsockname()[1]).route, ()), clock)

    play(scene)


def test_a_handshake_that_lasts_too_long_ends(clock: list[float]) -> None:
    async def scene(poller: Poller) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            await timed_out(poller, Pool(poller, led(listening.getsockname()[1]).route, ()), clock)

    play(scene)
