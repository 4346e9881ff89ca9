"""Strands on an edge-triggered epoll: nobody is forgotten, nobody is woken for another, nothing is left open."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import select
import socket
import ssl
import struct

import pytest
import trustme

from proxy import poller as module
from proxy.poller import CHUNK, READ, TURNS, WRITE, Channel, Poller, Strand
from tests.strands import half_pair, pair, play, result, start, swept, turns, until

SECONDS = 10.0
CA = trustme.CA()
LEAF = CA.issue_cert("api.test")


def server_context(most: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = most
    LEAF.configure_cert(context)
    return context


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    CA.configure_trust(context)
    return context


async def read(channel: Channel, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await channel.recv(SECONDS)
        assert more
        data += more
    return data


async def secure(client: Channel, server: Channel, most: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> None:
    accepted = start(server.start_tls(server_context(most), SECONDS, server_side=True))
    asked = start(client.start_tls(client_context(), SECONDS, server_hostname="api.test"))
    assert (await accepted, await asked) == (None, None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of pollers, looked at often; set `clock[0]`."""
    now = [1000.0]
    monkeypatch.setattr(module, "_SWEEP", 0.001)
    return now


# Reading and writing


def test_two_strands_speak_in_turn() -> None:
    async def scene(poller: Poller) -> None:
        left, right = pair(poller)

        async def ping() -> None:
            for number in range(1000):
                await left.send(b"%d" % number, SECONDS)
                assert await left.recv(SECONDS) == b"%d" % number

        async def pong() -> None:
            while data := await right.recv(SECONDS):
                await right.send(data, SECONDS)

        ponged = start(pong())
        assert await start(ping()) is None
        left.close()
        assert await ponged is None

    play(scene)


def test_a_sender_waits_until_the_peer_reads() -> None:
    """Back-pressure: no more is held than the kernel's buffers."""

    async def scene(poller: Poller) -> None:
        left, right = pair(poller)
        data = random.randbytes(8 << 20)
        sent = start(left.send(data, SECONDS))
        await turns()
        assert not sent.done()
        assert await result(read(right, len(data))) == data
        assert await sent is None

    play(scene)


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_goes_both_ways_at_once(most: ssl.TLSVersion) -> None:
    """Two strands on each end, one reading and one writing, all of them waiting on and off."""

    async def scene(poller: Poller) -> None:
        client, server = pair(poller)
        await secure(client, server, most)
        up, down = random.randbytes(3 << 20), random.randbytes(4 << 20)
        sent = [start(client.send(up, SECONDS)), start(server.send(down, SECONDS))]
        got_up, got_down = asyncio.create_task(result(read(server, len(up)))), result(read(client, len(down)))
        assert await got_down == down
        assert await got_up == up
        assert [await future for future in sent] == [None, None]

    play(scene)


def test_records_that_arrived_together_are_read_together() -> None:
    """The kernel tells of them once."""

    async def scene(poller: Poller) -> None:
        client, server = pair(poller)
        await secure(client, server)
        await result(client.send(bytes(40000), SECONDS))
        assert len(await result(server.recv(SECONDS))) == 40000
        await result(client.send(b"a", SECONDS))
        await result(client.send(b"b", SECONDS))
        assert await result(server.recv(SECONDS)) == b"ab"

    play(scene)


@pytest.mark.parametrize("tls", [False, True])
def test_the_end_is_empty_and_stays_so(tls: bool) -> None:
    """In TLS without a close_notify too: whether something is missing, framing tells."""

    async def scene(poller: Poller) -> None:
        left, right = pair(poller)
        if tls:
            await secure(right, left)
        await result(left.send(b"bye", SECONDS))
        left.close()
        assert [await result(right.recv(SECONDS)) for _ in range(3)] == [b"bye", b"", b""]

    play(scene)


def test_a_goodbye_is_told_from_a_cut() -> None:
    """RFC 8446 section 6.1."""

    async def scene(poller: Poller) -> None:
        client, server = pair(poller)
        await secure(client, server)
        await result(server.send(b"bye", SECONDS))
        server.say_goodbye()
        server.say_goodbye()
        server.close()
        server.say_goodbye()
        assert [await result(client.recv(SECONDS)) for _ in range(3)] == [b"bye", b"", b""]
        assert client.tls
        client.tls.unwrap()  # with a close_notify from the peer this ends well

    play(scene)


def test_who_is_still_sending_gets_the_answer_before_the_goodbye() -> None:
    """A close with unread bytes is a reset, which would take the answer away (RFC 9112 section 9.6)."""

    async def scene(poller: Poller) -> None:
        ours, theirs = tcp_pair()
        client, server = Channel(poller, ours), Channel(poller, theirs)
        await secure(client, server)
        upload = bytes(8 << 20)
        sent = start(client.send(upload, SECONDS))
        await turns()
        dropped = [0]

        async def refuse() -> None:
            await server.send(b"no", SECONDS)
            server.say_goodbye()
            server.sock.shutdown(socket.SHUT_WR)
            while more := await server.recv(SECONDS):
                dropped[0] += len(more)
            server.close()

        refused = start(refuse())
        assert await sent is None
        assert [await result(client.recv(SECONDS)) for _ in range(2)] == [b"no", b""]
        client.close()
        assert await refused is None
        assert dropped[0] > len(upload) - CHUNK  # OpenSSL has read a little

    play(scene)


def test_a_handshake_that_fails_is_an_error_on_both_ends() -> None:
    async def scene(poller: Poller) -> None:
        client, server = pair(poller)
        accepted = start(server.start_tls(server_context(), SECONDS, server_side=True))
        refused = await start(client.start_tls(client_context(), SECONDS, server_hostname="other.test"))
        assert isinstance(refused, ssl.SSLCertVerificationError)
        client.close()
        assert isinstance(await accepted, ssl.SSLError | None)  # in TLS 1.3 the server may be done before

    play(scene)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        return client, listening.accept()[0]


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_a_reset_before_a_handshake_leaves_nothing_behind() -> None:
    """Another connection may have the descriptor as soon as it is closed."""

    async def scene(poller: Poller) -> None:
        ours, theirs = tcp_pair()
        channel = Channel(poller, ours)
        theirs.send(b"\x16\x03\x01")
        reset(theirs)
        heir: list[Channel] = []

        async def accept() -> None:
            try:
                await channel.start_tls(server_context(), SECONDS, server_side=True)
            except OSError:
                fd = channel.fd
                channel.close()
                heir.extend(pair(poller))
                assert fd in {other.fd for other in heir}
                raise

        assert isinstance(await start(accept()), OSError)
        channel.close()
        await result(heir[0].send(b"x", SECONDS))
        assert await result(heir[1].recv(SECONDS)) == b"x"

    play(scene)


# Looking only


def test_a_peek_leaves_everything_where_it_is() -> None:
    async def scene(poller: Poller) -> None:
        channel, peer = half_pair(poller)
        peer.send(b"hello")
        assert await result(channel.peek(3, SECONDS)) == b"hel"
        assert await result(channel.peek(100, SECONDS)) == b"hello"
        more = asyncio.create_task(result(channel.peek(100, SECONDS, 5)))
        await turns()
        assert not more.done()
        peer.send(b" world")
        assert await more == b"hello world"
        assert await result(channel.recv(SECONDS)) == b"hello world"
        peer.close()
        assert await result(channel.peek(100, SECONDS)) == b""

    play(scene)


@pytest.mark.parametrize("before", [True, False])
def test_a_peek_for_more_ends_when_the_peer_hangs_up(before: bool) -> None:
    """With half a message unread the kernel tells of the end only once; the descriptor would be held for nothing."""

    async def scene(poller: Poller) -> None:
        channel, peer = half_pair(poller)
        peer.send(b"GET /")
        assert await result(channel.peek(100, SECONDS)) == b"GET /"
        if before:
            peer.close()
            await turns()
        more = asyncio.create_task(result(channel.peek(100, SECONDS, 5)))
        await turns()
        peer.close()
        assert await more == b""

    play(scene)


# Time


def test_a_wait_that_lasts_too_long_ends(clock: list[float]) -> None:
    async def scene(poller: Poller) -> None:
        poller.now = lambda: clock[0]
        left, _ = pair(poller)
        other, _ = pair(poller)
        waits = [start(left.recv(5)), start(left.send(bytes(8 << 20), 5)), start(other.peek(1, 5))]
        clock[0] += 4.9
        await swept(poller)
        assert not any(wait.done() for wait in waits)
        clock[0] += 0.2
        assert [type(await wait) for wait in waits] == [TimeoutError] * 3

    play(scene)


def test_a_wait_may_begin_again_after_it_ended(clock: list[float]) -> None:
    async def scene(poller: Poller) -> None:
        poller.now = lambda: clock[0]
        channel, peer = half_pair(poller)

        async def patient() -> None:
            with pytest.raises(TimeoutError):
                await channel.recv(5)
            assert await channel.recv(5) == b"late"

        ended = start(patient())
        clock[0] += 6
        await swept(poller)
        peer.send(b"late")
        assert await ended is None
        peer.close()

    play(scene)


def test_a_handshake_in_small_steps_is_not_given_more_time(clock: list[float]) -> None:
    """A byte now and then would hold a connection for hours."""

    async def scene(poller: Poller) -> None:
        poller.now = lambda: clock[0]
        channel, peer = half_pair(poller)
        accepted = start(channel.start_tls(server_context(), 10, server_side=True))
        for octet in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03":
            if accepted.done():
                break
            peer.send(bytes([octet]))
            clock[0] += 4
            await swept(poller)
        assert clock[0] == 1012
        assert isinstance(await accepted, TimeoutError)
        peer.close()

    play(scene)


# Closing


def test_a_close_wakes_whoever_waits() -> None:
    async def scene(poller: Poller) -> None:
        channel, peer = half_pair(poller)
        waits = [start(channel.recv(SECONDS)), start(channel.send(bytes(8 << 20), SECONDS))]
        channel.close()
        assert [type(wait.result()) for wait in waits] == [ConnectionAbortedError] * 2
        assert channel.closed
        for again in (channel.recv(SECONDS), channel.send(b"x", SECONDS), channel.wait(READ, SECONDS)):
            assert isinstance(await start(again), OSError)
        channel.close()
        peer.close()

    play(scene)


def test_strands_that_close_each_other_end_once() -> None:
    """Each end cuts the next, and the last the first, from within its own."""

    async def scene(poller: Poller) -> None:
        pairs = [half_pair(poller) for _ in range(50)]
        ends: list[int] = []

        def ended(number: int, error: BaseException | None) -> None:
            assert isinstance(error, ConnectionAbortedError)
            ends.append(number)
            for step in (0, 1, -1):
                pairs[(number + step) % len(pairs)][0].close()

        for number, (channel, _) in enumerate(pairs):
            for work in (channel.recv(SECONDS), channel.send(bytes(8 << 20), SECONDS)):
                Strand(work, lambda error, number=number: ended(number, error)).step()
        pairs[0][0].close()
        assert sorted(ends) == sorted([*range(50), *range(50)])
        for _, peer in pairs:
            peer.close()

    play(scene)


def test_a_strand_may_close_what_another_waits_on_who_closes_back() -> None:
    """As a client's strand and its upload's do."""

    async def scene(poller: Poller) -> None:
        client, client_peer = half_pair(poller)
        upstream, upstream_peer = half_pair(poller)

        async def upload() -> None:
            try:
                await upstream.send(bytes(8 << 20), SECONDS)
            finally:
                client.close()
                upstream.close()

        async def serve() -> None:
            await client.recv(SECONDS)
            upstream.close()
            await client.recv(SECONDS)

        uploaded, served = start(upload()), start(serve())
        client_peer.send(b"x")
        assert isinstance(await uploaded, ConnectionAbortedError)
        assert isinstance(await served, OSError)
        client_peer.close()
        upstream_peer.close()

    play(scene)


def test_an_event_is_not_told_to_who_took_over_the_descriptor() -> None:
    """Both happen in one look at the kernel; the first strand closes the second's, and opens one with its number."""

    async def scene(poller: Poller) -> None:
        first, first_peer = half_pair(poller)
        second, second_peer = half_pair(poller)
        told: list[bool] = []
        heirs: list[Channel] = []

        async def take_over() -> None:
            await first.recv(SECONDS)
            number = second.fd
            second.close()
            heirs.extend(pair(poller))
            (heir,) = (channel for channel in heirs if channel.fd == number)
            heir.on_event = told.append

        await turns()
        ended = start(take_over())
        first_peer.send(b"x")
        second_peer.close()
        assert await ended is None
        await turns()
        assert told == []
        assert not any(heir.hung_up for heir in heirs)
        first_peer.close()

    play(scene)


def test_a_socket_that_is_given_away_is_left_alone() -> None:
    async def scene(poller: Poller) -> None:
        channel, peer = half_pair(poller)
        peer.send(b"hello")
        assert await result(channel.peek(9, SECONDS)) == b"hello"
        sock = channel.detach()
        assert channel.closed
        peer.send(b" world")
        await turns()
        assert sock.recv(99) == b"hello world"
        channel.close()
        sock.send(b"still here")
        assert peer.recv(99) == b"still here"
        sock.close()
        peer.close()

    play(scene)


def test_the_end_of_a_poller_is_the_end_of_all() -> None:
    """Also for who wants to dial again when it is cut."""

    async def scene(poller: Poller) -> None:
        async def dial_again(channel: Channel) -> None:
            try:
                await channel.recv(SECONDS)
            except ConnectionAbortedError:
                ours, theirs = socket.socketpair()
                theirs.close()
                Channel(poller, ours)

        pairs = [half_pair(poller) for _ in range(20)]
        ends = [start(dial_again(channel)) for channel, _ in pairs]
        poller.close()
        assert [type(end.result()) for end in ends] == [ConnectionAbortedError] * 20
        for _, peer in pairs:
            peer.close()

    play(scene)


def test_it_may_come_from_a_strand() -> None:
    async def scene(poller: Poller) -> None:
        pairs = [half_pair(poller) for _ in range(9)]

        async def stop(channel: Channel) -> None:
            await channel.recv(SECONDS)
            poller.close()

        ends = [start(stop(channel)) for channel, _ in pairs]
        await turns()
        for _, peer in pairs:
            peer.send(b"x")
        errors = [await end for end in ends]
        assert errors.count(None) == 1
        assert sum(isinstance(error, ConnectionAbortedError) for error in errors) == 8
        for _, peer in pairs:
            peer.close()

    play(scene)


# What happens while nobody reads


def test_a_hang_up_is_told_while_nobody_reads() -> None:
    async def scene(poller: Poller) -> None:
        channel, peer = half_pair(poller)
        told: list[bool] = []
        channel.on_event = told.append
        peer.send(b"x")
        await turns()
        assert told == [False]
        peer.shutdown(socket.SHUT_WR)
        await turns()
        assert told == [False, True]
        assert channel.hung_up
        assert [await result(channel.recv(SECONDS)) for _ in range(2)] == [b"x", b""]
        peer.close()

    play(scene)


def test_it_is_told_to_who_writes_too() -> None:
    """The client of a download goes away: the upstream is cut, not read to its end."""

    async def scene(poller: Poller) -> None:
        channel, peer = half_pair(poller)
        channel.on_event = lambda hung_up: channel.close() if hung_up else None
        sent = start(channel.send(bytes(8 << 20), SECONDS))
        await turns()
        peer.close()
        assert isinstance(await sent, ConnectionAbortedError)

    play(scene)


def test_it_is_the_reader_who_is_told_where_one_reads() -> None:
    async def scene(poller: Poller) -> None:
        channel, peer = half_pair(poller)
        told: list[bool] = []
        channel.on_event = told.append
        waiting = asyncio.create_task(result(channel.recv(SECONDS)))
        await turns()
        peer.send(b"x")
        assert await waiting == b"x"
        waiting = asyncio.create_task(result(channel.recv(SECONDS)))
        await turns()
        peer.close()
        assert await waiting == b""
        assert told == []

    play(scene)


# What goes wrong


def test_an_exception_reaches_the_end() -> None:
    async def scene(poller: Poller) -> None:
        async def fail() -> None:
            raise KeyError

        assert isinstance(await start(fail()), KeyError)
        assert module._current is None

    play(scene)


def test_what_goes_wrong_at_an_end_stops_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    """The kernel does not tell again of the events that came with it."""

    async def scene(poller: Poller) -> None:
        def fail(_: object) -> None:
            raise ValueError("geheim")

        pairs = [half_pair(poller) for _ in range(9)]
        ends = []
        await turns()
        for number, (channel, _) in enumerate(pairs):
            if number % 3 == 0:
                Strand(channel.recv(SECONDS), fail).step()  # type: ignore[arg-type]
            elif number % 3 == 1:
                channel.on_event = fail
            else:
                ends.append(asyncio.create_task(result(channel.recv(SECONDS))))
        await turns()
        for _, peer in pairs:
            peer.send(b"x")
        assert [await end for end in ends] == [b"x"] * 3
        for _, peer in pairs:
            peer.close()

    play(scene)
    assert len(caplog.records) >= 6
    assert "geheim" not in caplog.text


def test_two_that_wait_for_the_same_are_both_woken() -> None:
    """In TLS a reader may have to write, as an answer to a key update, while a writer waits already."""

    async def scene(poller: Poller) -> None:
        left, right = pair(poller)
        with contextlib.suppress(BlockingIOError):
            while True:
                left.sock.send(bytes(CHUNK))
        await turns()
        waits = [start(left.wait(WRITE, SECONDS)) for _ in range(2)]
        await turns()
        assert not any(wait.done() for wait in waits)
        with contextlib.suppress(BlockingIOError):
            while True:
                right.sock.recv(CHUNK)
        assert [await wait for wait in waits] == [None, None]

    play(scene)


# Work of asyncio's kind


def test_work_that_does_not_suspend_costs_no_turn_of_the_loop() -> None:
    async def scene(poller: Poller) -> None:
        async def work() -> int:
            return 5

        async def strand() -> None:
            assert await Strand.finish(work()) == 5

        assert start(strand()).result() is None

    play(scene)


def test_work_that_suspends_is_waited_for() -> None:
    """And the strand that waits is the one that goes on."""

    async def scene(poller: Poller) -> None:
        gate = asyncio.Event()
        channel, peer = half_pair(poller)

        async def work(number: int) -> int:
            await gate.wait()
            await asyncio.sleep(0)
            return number

        async def strand(number: int) -> None:
            me = module._current
            assert await Strand.finish(work(number)) == number
            assert module._current is me
            await channel.send(b"%d" % number, SECONDS)

        ends = [start(strand(number)) for number in range(5)]
        await turns()
        assert not any(end.done() for end in ends)
        gate.set()
        assert [await end for end in ends] == [None] * 5
        assert sorted(peer.recv(99)) == sorted(b"01234")
        peer.close()

    play(scene)


@pytest.mark.parametrize("suspends", [True, False])
@pytest.mark.parametrize("kind", [KeyError, TimeoutError, asyncio.CancelledError])
def test_an_exception_of_the_work_reaches_the_strand(kind: type[BaseException], suspends: bool) -> None:
    async def scene(poller: Poller) -> None:
        async def work() -> None:
            if suspends:
                await asyncio.sleep(0)
            raise kind

        async def strand() -> None:
            await Strand.finish(work())

        assert isinstance(await start(strand()), kind)

    play(scene)


def test_a_strand_whose_connection_ended_meanwhile_learns_it_after_the_work() -> None:
    async def scene(poller: Poller) -> None:
        gate = asyncio.Event()
        channel, peer = half_pair(poller)

        async def strand() -> None:
            await Strand.finish(gate.wait())
            await channel.recv(SECONDS)

        end = start(strand())
        channel.close()
        await turns()
        assert not end.done()
        gate.set()
        assert isinstance(await end, OSError)
        peer.close()

    play(scene)


# Many


@pytest.mark.parametrize("tls", [False, True])
def test_a_transfer_that_never_waits_starves_nobody(tls: bool) -> None:
    """Both of its peers are always ready; another connection, and asyncio, have their turn nevertheless."""

    async def scene(poller: Poller) -> None:
        left, right = pair(poller)
        if tls:
            await secure(left, right)
        quiet, peer = half_pair(poller)
        stop = [False]
        rounds = [0]

        async def transfer() -> None:
            while not stop[0]:
                rounds[0] += 1
                await left.send(bytes(CHUNK), SECONDS)  # a short read would wait
                await right.recv(SECONDS)

        async def other() -> None:
            await quiet.recv(SECONDS)
            stop[0] = True

        waiting, moving = start(other()), start(transfer())
        began = rounds[0]
        assert began == TURNS // 2 + 1
        peer.send(b"stop")
        assert (await waiting, await moving) == (None, None)
        assert rounds[0] < 20 * TURNS
        peer.close()

    play(scene)


def test_a_thousand_connections_are_served() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))

    async def scene(poller: Poller) -> None:
        async def echo(channel: Channel) -> None:
            while data := await channel.recv(SECONDS):
                await channel.send(data, SECONDS)

        async def ask(channel: Channel, number: int) -> None:
            for _ in range(5):
                await channel.send(b"%d" % number, SECONDS)
                assert await channel.recv(SECONDS) == b"%d" % number

        pairs = [pair(poller) for _ in range(1000)]
        echoes = [start(echo(right)) for _, right in pairs]
        asks = [start(ask(left, number)) for number, (left, _) in enumerate(pairs)]
        assert [await end for end in asks] == [None] * 1000
        for left, _ in pairs[:500]:
            left.close()
        assert [await end for end in echoes[:500]] == [None] * 500
        poller.close()
        assert {type(end.result()) for end in echoes[500:]} == {ConnectionAbortedError}

    play(scene)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_wake_up_is_lost_in_a_crowd(tls: bool, seed: int) -> None:
    """Sizes around those of records and buffers, in odd pieces through relays that stop now and then."""

    async def scene(poller: Poller) -> None:
        dice = random.Random(seed)

        async def relay(source: Channel, target: Channel) -> None:
            while data := await source.recv(SECONDS):
                if dice.random() < 0.2:
                    await Strand.finish(asyncio.sleep(0))
                await (target.send_soon if dice.random() < 0.5 else target.send)(data, SECONDS)
            await target.send(b"", SECONDS)
            target.close()

        async def produce(channel: Channel, data: bytes) -> None:
            at = 0
            while at < len(data):
                size = dice.choice([1, 16383, 16384, 16385, 65536, 65537, 200000])
                await channel.send(data[at : at + size], SECONDS)
                at += size
            channel.close()

        async def consume(channel: Channel, data: bytes) -> None:
            got = bytearray()
            while more := await channel.recv(SECONDS):
                got += more
                if dice.random() < 0.1:
                    await Strand.finish(asyncio.sleep(0))
            assert got == data

        ends = []
        for _ in range(8):
            first, second = pair(poller), pair(poller)
            if tls:  # the server sends: a client that closes with tickets unread resets the connection
                await secure(first[1], first[0])
                await secure(second[1], second[0])
            data = dice.randbytes(dice.randrange(1, 1 << 20))
            ends += [
                start(consume(second[1], data)),
                start(relay(first[1], second[0])),
                start(produce(first[0], data)),
            ]
        assert [await end for end in ends] == [None] * len(ends)

    play(scene)


def test_what_is_sent_soon_leaves_when_all_were_told() -> None:
    async def scene(poller: Poller) -> None:
        told: list[bool] = []  # each time, whether an answer had left
        pairs = [half_pair(poller) for _ in range(3)]

        async def answer(channel: Channel) -> None:
            while data := await channel.recv(SECONDS):
                await channel.send_soon(data, SECONDS)
                told.append(bool(select.select([peer for _, peer in pairs], [], [], 0)[0]))

        ends = [start(answer(channel)) for channel, _ in pairs]
        for _, peer in pairs:
            peer.send(b"x")
        await until(lambda: len(told) == 3)
        assert told == [False] * 3
        assert [peer.recv(10) for _, peer in pairs] == [b"x"] * 3
        for _, peer in pairs:
            peer.close()
        assert [await end for end in ends] == [None] * 3
        for channel, _ in pairs:
            channel.close()

    play(scene)


@pytest.mark.parametrize("tls", [False, True])
def test_what_the_kernel_did_not_take_goes_when_it_does(tls: bool) -> None:
    """Also where nothing more is sent behind it, and in order."""

    async def scene(poller: Poller) -> None:
        left, right = pair(poller)
        if tls:
            await secure(right, left)
        sent = bytearray()

        def waits() -> bool:
            return bool(left._unsent or (left._cipher and left._cipher.unsent))

        async def fill() -> None:
            poller.corked = []  # as in a look at many
            piece = random.Random(1).randbytes(1000)
            while not waits():
                await left.send_soon(piece, SECONDS)
                sent.extend(piece)
                poller.corked.clear()
                left.uncork()
            poller.corked = None

        await result(fill())
        assert waits()
        assert await result(read(right, len(sent))) == sent
        assert not waits()
        left.close()
        right.close()

    play(scene)


async def told(poller: Poller, owners: list[str]) -> list[str]:
    """The owners of channels that all have something to read, in the order in which they are told."""
    order: list[str] = []

    async def reader(channel: Channel) -> None:
        await channel.recv(SECONDS)
        order.append(channel.owner)

    pairs = [half_pair(poller) for _ in owners]
    for (channel, _), owner in zip(pairs, owners, strict=True):
        channel.owner = owner
    ended = [start(reader(channel)) for channel, _ in pairs]
    for _, peer in pairs:
        peer.send(b"x")
    await asyncio.gather(*ended)
    for channel, peer in pairs:
        channel.close()
        peer.close()
    return order


def test_owners_take_turns() -> None:
    """One with many connections does not make another wait for all of them."""

    async def scene(poller: Poller) -> None:
        order = await told(poller, [*["many"] * 8, "one"])
        assert order.index("one") <= 1
        assert order.count("many") == 8

    play(scene)


def test_what_somebody_else_sends_leaves_at_once() -> None:
    """The answers of one with many connections leave together; another one's does not wait for them."""

    async def scene(poller: Poller) -> None:
        left: list[tuple[str, bool]] = []
        pairs = [half_pair(poller) for _ in range(5)]

        async def answer(channel: Channel, peer: socket.socket) -> None:
            data = await channel.recv(SECONDS)
            await channel.send_soon(data, SECONDS)
            left.append((channel.owner, bool(select.select([peer], [], [], 0)[0])))

        for number, (channel, _) in enumerate(pairs):
            channel.owner = "one" if number == 2 else "many"
        ends = [start(answer(channel, peer)) for channel, peer in pairs]
        for _, peer in pairs:
            peer.send(b"x")
        await asyncio.gather(*ends)
        assert ("one", True) in left
        assert left.count(("many", False)) == 3  # all but its last
        for channel, peer in pairs:
            channel.close()
            peer.close()

    play(scene)


def test_everybody_is_told_in_the_end() -> None:
    """More than are told in a look, of many owners, while asyncio's own work goes on."""

    async def scene(poller: Poller) -> None:
        owners = [f"agent-{number % 7}" if number % 2 else "many" for number in range(5 * module.BATCH)]
        order = await told(poller, owners)
        assert set(order[: module.BATCH // 2]) == {"many", *(f"agent-{number}" for number in range(7))}
        assert len(order) == len(owners)

    play(scene)
