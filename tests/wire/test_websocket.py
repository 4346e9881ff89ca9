"""WebSockets: only where a rule says so, and nothing the upstream says in one gives a secret away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Message,
    Ping,
    Pong,
    Request,
    TextMessage,
)
from wsproto.extensions import Extension, PerMessageDeflate

from tests.harness import Connection, Proxy, Reply, Upstream, refused, wait_for

SECRET = "real-key-4f1e9b7c2d"
CLEAN = "[redacted:api]"
RULES = """
version: 1
rules:
  - {name: api, match: {host: api.test, path: /v1/**}, action: allow}
  - name: live
    match: {host: api.test, path: /live/**, websocket: true}
    action: allow
    inject: [{credential: api, as: bearer}]
"""
HANDSHAKE = (
    "GET {} HTTP/1.1\r\nhost: api.test\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.fixture(scope="module")
def proxy(make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(RULES)
    proxy.agent()
    proxy.credential("api", SECRET, "--host", "api.test")
    return proxy


class Server:
    """The upstream's end: accepts, keeps what it hears, and answers a text `say` with the events of that name."""

    def __init__(self, upstream: Upstream, **said: list[Event]) -> None:
        self.heard: list[Event] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.said = said
        upstream.raw = self.serve

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ws = WSConnection(ConnectionType.SERVER)
        while data := await reader.read(65536):
            ws.receive_data(data)
            for event in ws.events():
                for answer in self.answers(event):
                    writer.write(ws.send(answer))

    def answers(self, event: Event) -> Iterator[Event]:
        self.heard.append(event)
        match event:
            case Request():
                self.headers = list(event.extra_headers)
                extensions: list[Extension] = [PerMessageDeflate()] if event.extensions else []
                yield AcceptConnection(extensions=extensions)
            case TextMessage() if event.data in self.said:
                yield from self.said[event.data]
            case Message():
                yield type(event)(data=event.data, message_finished=event.message_finished)
            case CloseConnection():
                yield event.response()


class Client:
    """The sandbox's end."""

    def __init__(self, connection: Connection, path: str, *, deflate: bool = False) -> None:
        self.connection = connection
        self.ws = WSConnection(ConnectionType.CLIENT)
        extensions: list[Extension] = [PerMessageDeflate()] if deflate else []
        connection.send(self.ws.send(Request(host="api.test", target=path, extensions=extensions)))
        self.events = self._events()
        accepted = next(self.events)
        assert isinstance(accepted, AcceptConnection)
        assert bool(accepted.extensions) == deflate

    def _events(self) -> Iterator[Event]:
        while data := self.connection.recv():
            self.ws.receive_data(data)
            yield from self.ws.events()

    def send(self, *events: Event) -> None:
        for event in events:
            self.connection.send(self.ws.send(event))

    def ask(self, text: str) -> Event:
        self.send(TextMessage(data=text))
        return next(self.events)


def test_without_a_rule_for_websockets_an_upgrade_is_refused(proxy: Proxy, upstream: Upstream) -> None:
    """Although the path is allowed."""
    tunnel = proxy.tunnel("api.test")
    tunnel.send(HANDSHAKE.format("/v1/x").encode())
    refused(tunnel.response(), "protocol_not_allowed")
    assert upstream.connections == 0


def test_a_rule_for_websockets_allows_other_requests_as_well(proxy: Proxy, upstream: Upstream) -> None:
    """And an upstream that does not upgrade is just answered."""
    assert proxy.get("https://api.test/live/x").status == 200
    upstream.handler = lambda _: Reply(403, body=b"not you")
    tunnel = proxy.tunnel("api.test")
    tunnel.send(HANDSHAKE.format("/live/x").encode())
    response = tunnel.response()
    assert (response.status, response.body) == (403, b"not you")
    tunnel.send(b"GET /live/y HTTP/1.1\r\nhost: api.test\r\n\r\n")
    assert tunnel.response().status == 403
    assert upstream.seen[1].header("upgrade") == ["websocket"]
    assert upstream.seen[1].header("connection") == ["Upgrade"]


@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
def test_messages_pass_both_ways(proxy: Proxy, upstream: Upstream, deflate: bool) -> None:
    """With the credential in the handshake, and one line on record when it is over."""
    server = Server(upstream)
    path = f"/live/{deflate}"
    client = Client(proxy.tunnel("api.test"), path, deflate=deflate)
    assert (b"authorization", f"Bearer {SECRET}".encode()) in [(k.lower(), v) for k, v in server.headers]
    assert client.ask("hello") == TextMessage(data="hello", message_finished=True)
    client.send(BytesMessage(data=b"\x00\x01"))
    assert next(client.events) == BytesMessage(data=b"\x00\x01", message_finished=True)
    client.send(CloseConnection(code=1000, reason="bye"))
    assert isinstance(next(client.events), CloseConnection)
    wait_for(lambda: isinstance(server.heard[-1], CloseConnection))
    (line,) = proxy.audit(path=path)
    assert (line["status"], line["verdict"], line["rule"]) == (101, "allow", "live")
    assert (line["request_bytes"], line["response_bytes"]) == (7, 7)


@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
def test_a_secret_in_a_message_is_redacted(proxy: Proxy, upstream: Upstream, deflate: bool) -> None:
    """In one frame, and over the border of two."""
    halves = [TextMessage(data=f"a {SECRET[:7]}", message_finished=False), TextMessage(data=f"{SECRET[7:]} b")]
    Server(upstream, whole=[TextMessage(data=f"you sent {SECRET}!")], halves=halves)
    path = f"/live/secret/{deflate}"
    client = Client(proxy.tunnel("api.test"), path, deflate=deflate)
    assert client.ask("whole") == TextMessage(data=f"you sent {CLEAN}!", message_finished=True)
    first = client.ask("halves")
    assert isinstance(first, TextMessage)
    text = first.data if first.message_finished else first.data + next(client.events).data  # type: ignore[attr-defined]
    assert text == f"a {CLEAN} b"
    client.connection.close()
    (line,) = proxy.audit(path=path)
    assert line["redacted"] == [{"credential": "api", "where": "websocket", "count": 2}]


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (Ping(payload=SECRET.encode()), Ping(payload=CLEAN.encode())),
        (Pong(payload=SECRET.encode()), Pong(payload=CLEAN.encode())),
        (CloseConnection(code=4001, reason=f"bad {SECRET}"), CloseConnection(code=4001, reason=f"bad {CLEAN}")),
        (CloseConnection(code=4001, reason=SECRET * 6), CloseConnection(code=4001, reason=CLEAN * 6)),
    ],
    ids=["ping", "pong", "close", "long close"],
)
def test_a_secret_in_a_control_frame_is_redacted(proxy: Proxy, upstream: Upstream, said: Event, heard: Event) -> None:
    """An upstream that says why it hangs up may quote the token; a control frame holds 125 bytes (RFC 6455)."""
    Server(upstream, tell=[said])
    client = Client(proxy.tunnel("api.test"), "/live/x")
    assert client.ask("tell") == heard
    client.connection.close()


def test_the_end_of_either_side_ends_the_other(proxy: Proxy, upstream: Upstream) -> None:
    """Without a closing handshake."""
    Server(upstream)
    client = Client(proxy.tunnel("api.test"), "/live/gone")
    client.connection.close()
    assert proxy.audit(path="/live/gone")

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ws = WSConnection(ConnectionType.SERVER)
        ws.receive_data(await reader.readuntil(b"\r\n\r\n"))
        writer.write(ws.send(AcceptConnection()))

    upstream.raw = hang_up
    client = Client(proxy.tunnel("api.test"), "/live/dead")
    assert [type(event) for event in client.events] in ([], [CloseConnection])
    assert proxy.audit(path="/live/dead")
