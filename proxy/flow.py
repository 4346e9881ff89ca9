"""The only translator between mitmproxy's HTTPFlow and our own words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from mitmproxy import http
from mitmproxy.net.http import http1
from wsproto.events import CloseConnection, Event, Ping, Pong

from proxy.address import Host, parse_authority
from proxy.bodymatch import Body
from proxy.coding import Undecodable, narrow_accept_encoding
from proxy.exchange import Exchange, Injected
from proxy.framing import HeaderBlock
from proxy.http1 import ResponseHead, response_bytes
from proxy.outbound import Opened, edit_headers
from proxy.policy import Answer, Edit, Rule
from proxy.proof import Told
from proxy.reason import Reason
from proxy.redact import BodyRedactor, Replacer, ReplacerStream
from proxy.request import DEFAULT_PORTS, Ambiguous, Field, HeaderFacts, RequestView, fold, strip_headers
from proxy.upstream import Refused

if TYPE_CHECKING:
    from proxy.settled import Ground

STATE = "sallyport"
MAX_CONTROL = 125  # bytes in a control frame (RFC 6455 section 5.5)
# Of a body that may be changed: how long it is, what it is the digest of (RFC 9530), that a part can be asked for.
NO_LONGER_TRUE = frozenset(
    {
        *(b"content-encoding", b"content-length", b"accept-ranges"),
        *(b"content-md5", b"digest", b"content-digest", b"repr-digest"),
    }
)
MAX_EXPANDED = 16 * 1024 * 1024  # bytes that one read of 64 KiB may decode to
# Not asked of an upstream whose answer is scanned: a part of a body could be half a secret. Host is written anew.
SESSION_HEADERS = frozenset({b"accept-encoding", b"range", b"if-range", b"host"})
_HOST = (b"host",)


@dataclass(frozen=True, slots=True)
class Tunnel:
    """What an accepted CONNECT fixed for every request inside it."""

    host: Host
    port: int
    agent_id: str
    proofs: tuple[str, ...]
    told: Told | None = None  # what its proof said of the agent


@dataclass(init=False)
class FlowState:
    """Everything of ours that a flow carries, at the metadata key `STATE`. What was never set is read from the class:
    one is made for each request."""

    scheme: str = ""  # of the request line, before mitmproxy replaced it
    authority: str = ""
    exchange: Exchange | None = None
    view: RequestView | None = None
    decided: bool = False
    answered: bool = False  # by us: there is no upstream
    placeholders: Replacer | None = None
    sign: Callable[[bytes], None] | None = None  # waits for the body
    body_credentials: tuple[Opened, ...] = ()
    redactor: Replacer | None = None
    response_edits: tuple[Edit, ...] = ()
    sent_at: float = 0.0
    recorded: bool = False
    request_stream: ReplacerStream | None = None
    response_body: BodyRedactor | None = None
    client_gone: bool = False
    body_limit: tuple[int, Rule] | None = None
    stopped: Refused | None = None  # while its body was on its way
    streamed: bool = False  # bytes of its body may have left
    block: HeaderBlock | None = None  # where the fast lane read it
    answer: ResponseHead | None = None  # where the fast lane read it
    whole: bytes | None = None  # the body of the response, where all of it came with the head
    guarded: tuple[RequestView, bool] | None = None  # where to, and whether keys are looked for by their form
    held: tuple[int, Callable[[], None]] | None = None  # a body for a rule: bytes at most, and what refuses more
    body: Body | None = None  # as a rule sees it
    may_send: Callable[[bytes], bool] = lambda _: False  # on a WebSocket
    close: bool = False  # the client wants the connection closed (RFC 9112 section 9.6)
    http10: bool = False
    rules: tuple[Rule, ...] = ()  # whose obligations were met
    rests_on: Ground | None = None  # what the decision rested on, where that is all that the next one would rest on

    def __init__(
        self, scheme: str = "", authority: str = "", exchange: Exchange | None = None, block: HeaderBlock | None = None
    ) -> None:
        self.scheme, self.authority, self.exchange, self.block = scheme, authority, exchange, block


def state_of(flow: http.HTTPFlow) -> FlowState:
    """The flow's state, made when first asked for."""
    try:
        state: FlowState = flow.metadata[STATE]
    except KeyError:
        state = flow.metadata[STATE] = FlowState()
    return state


def view_of(flow: http.HTTPFlow, tunnel: Tunnel | None) -> RequestView:
    """The request as it is matched: the tunnel or the absolute target says where to, all else must agree.

    Raises Ambiguous and Refused.
    """
    state, data = state_of(flow), flow.request.data
    if tunnel:
        scheme, host, port = "https", tunnel.host, tunnel.port
        if state.scheme not in ("", scheme):
            raise Refused(Reason.AUTHORITY_MISMATCH)
        if state.authority:
            _agree(state.authority, scheme, host, port)
    else:
        scheme = state.scheme
        if not state.authority:
            raise Ambiguous("a proxy needs the whole URL in the request line")
        if scheme not in DEFAULT_PORTS:
            raise Refused(Reason.PROTOCOL_NOT_ALLOWED, "Only http and https URLs are forwarded.")
        host, port = _authority(state.authority, scheme)
    version = data.http_version
    state.http10 = version == b"HTTP/1.0"
    state.close = state.http10  # until the headers could be read
    facts = state.block.facts if state.block else HeaderFacts.of(data.headers.fields)
    state.close = facts.close or (state.http10 and not facts.keep) if version[:6] == b"HTTP/1" else False
    if tunnel and not facts.hosts and version == b"HTTP/1.1":
        raise Ambiguous("it has no Host header")
    for value in facts.hosts:
        _agree(value, scheme, host, port)
    return RequestView.of(data.method.decode("latin-1"), scheme, host, port, data.path.decode("latin-1"), facts)


@lru_cache(maxsize=512)
def _authority(text: str, scheme: str) -> tuple[Host, int]:
    has_port = text.rpartition(":")[2].isdigit() and not text.endswith("]")
    try:
        return parse_authority(text if has_port else f"{text.removesuffix(':')}:{DEFAULT_PORTS[scheme]}")
    except ValueError:
        raise Ambiguous("its authority is not a host and port") from None


def _agree(text: str, scheme: str, host: Host, port: int) -> None:
    if _authority(text.strip(), scheme) != (host, port):
        raise Refused(Reason.AUTHORITY_MISMATCH)


def _closes(version: str | bytes, headers: http.Headers) -> bool:
    return bool(http1.connection_close(version, headers))  # type: ignore[no-untyped-call]


def proxy_authorization(flow: http.HTTPFlow) -> list[str]:
    """Every value of the header that names the agent."""
    return [
        value.decode("latin-1")
        for name, value in flow.request.data.headers.fields
        if name.lower() == b"proxy-authorization"
    ]


def write_request(flow: http.HTTPFlow, view: RequestView, *, scanned: bool) -> None:
    """Make `flow` send `view` and nothing else. `scanned`: its response must be readable for redaction."""
    data = flow.request.data
    authority = view.authority.encode()
    headers: list[Field] = [(b"Host", authority)]
    if scanned:
        accepted = []
        for field in view.headers:
            folded = fold(field[0])
            if folded == b"accept-encoding":
                accepted.append(field[1])
            elif folded not in SESSION_HEADERS:
                headers.append(field)
        headers.append((b"Accept-Encoding", _narrowed(*accepted)))
    else:
        headers += strip_headers(view.headers, _HOST)
    if view.upgrade == "websocket":
        headers += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    data.method, data.scheme = view.method.encode("latin-1"), view.scheme.encode()
    data.host, data.port = view.host.name, view.port
    data.path = view.path_and_query.encode("latin-1")
    if data.http_version[:6] != b"HTTP/1":
        del headers[0]
        if flow.request.headers.get("te") == "trailers":  # gRPC asks for it (RFC 9113 section 8.2.2 allows no other)
            headers.append((b"te", b"trailers"))
        data.authority = authority
    else:
        data.authority = b""
        data.http_version = b"HTTP/1.1"
    data.headers = fast_headers(headers)


@lru_cache(maxsize=128)
def _narrowed(*accepted: bytes) -> bytes:
    return narrow_accept_encoding([value.decode("latin-1") for value in accepted]).encode()


def fast_headers(fields: Iterable[Field]) -> http.Headers:
    """mitmproxy's headers without its check of each name and value, which costs more than the rest of a request."""
    headers = object.__new__(http.Headers)
    headers.fields = tuple(fields)
    return headers


def note_body_injections(state: FlowState, found: Counter[str]) -> None:
    """Put on record which credentials replaced a placeholder in the body."""
    assert state.exchange
    state.exchange.injected = (
        *state.exchange.injected,
        *[
            Injected(opened.name, opened.version, "placeholder:body")
            for opened in state.body_credentials
            if found[opened.name]
        ],
    )


def refusal(refused: Refused, exchange: Exchange, view: RequestView | None, *, http2: bool = False) -> http.Response:
    """The answer to a request that does not go out (contract section 6)."""
    reason = refused.reason
    words = {
        "agent": exchange.agent_id or "An unknown agent",
        "method": view.method if view else exchange.method,
        "target": view.target if view else exchange.host,
        "detail": refused.detail,
    }
    error = {
        "code": str(reason),
        "message": reason.message.format_map(words),
        "agent": exchange.agent_id or None,
        "rule": refused.rule.name if refused.rule else None,
        "request_id": exchange.id,
        "hint": reason.hint,
    }
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"sallyport-decision", f"{exchange.verdict}; reason={reason}; id={exchange.id}".encode()),
    ]
    if reason.status == 407:
        headers.append((b"proxy-authenticate", b'Basic realm="sallyport"'))
    if reason.status in (429, 503):
        headers.append((b"retry-after", b"%d" % refused.retry_after))
    return _response(reason.status, headers, body)


def answer(given: Answer) -> http.Response:
    """What a rule answers itself."""
    body = given.body.encode()
    headers = edit_headers([], Edit(set=given.headers))
    headers = strip_headers(headers, frozenset({b"content-length", b"transfer-encoding", b"connection"}))
    return _response(given.status, [*headers, (b"content-length", str(len(body)).encode())], body)


def _response(status: int, headers: Iterable[Field], body: bytes) -> http.Response:
    return http.Response.make(status, body, http.Headers(list(headers)))


def clean_response_headers(flow: http.HTTPFlow, edits: tuple[Edit, ...], redactor: Replacer | None) -> None:
    """Strip what is ours or of one hop, apply the rule's edits, redact names and values."""
    response = flow.response
    assert response
    state, data = state_of(flow), response.data
    head = None if state.close or state.http10 else state.answer
    if head and (known := head.cleaned) and known.redactor is redactor and known.edits is edits:
        data.headers = fast_headers(known.fields)
        return
    upgraded = data.status_code == 101
    fields = [field for field in data.headers.fields if _passes_back(field[0]) or (upgraded and _is_upgrade(field[0]))]
    for edit in edits:
        fields = edit_headers(fields, edit)
    values = b"\0".join([data.reason, *[part for field in fields for part in field]])
    if b"\n" in values or b"\r" in values:
        fields = [(name, _LINE_BREAK.sub(b" ", value)) for name, value in fields]
    if redactor and redactor.finds(values):
        exchange, head = state.exchange, None
        fields = _redacted_fields(fields, redactor, exchange)
        data.reason = _redacted(data.reason, redactor, exchange)
    if upgraded:
        fields.append((b"Connection", b"Upgrade"))
    elif flow.request.data.http_version[:6] == b"HTTP/1" and (
        state.close or (data.http_version == b"HTTP/1.0" and _closes(data.http_version, data.headers))
    ):
        fields.append((b"Connection", b"close"))
    data.headers = fast_headers(fields)
    _frame(flow, response)
    if head:
        passed: tuple[Field, ...] = data.headers.fields
        lines = response_bytes(data.status_code, data.reason, passed)
        head.cleaned = Cleaned(redactor, edits, passed, lines, _is_coded(passed))


def _is_coded(fields: Iterable[Field]) -> bool:
    return any(name.lower() == b"content-encoding" for name, _ in fields)


@dataclass(slots=True)
class Cleaned:
    """A response head as it is passed on where no secret is in it: `lines` are all its bytes, and `streamed` those in
    front of a body that is looked through on its way, once there was one. Good for the same `redactor` and `edits`."""

    redactor: Replacer | None
    edits: tuple[Edit, ...]
    fields: tuple[Field, ...]
    lines: bytes
    coded: bool
    streamed: bytes | None = None


def remember_streamed(flow: http.HTTPFlow, lines: bytes) -> None:
    """Of an answer that is streamed: all the bytes of its head, for the next one that begins alike."""
    state = state_of(flow)
    known: Cleaned | None = state.answer.cleaned if state.answer else None
    if not known or known.redactor is not state.redactor or known.edits is not state.response_edits:
        return
    if not (known.coded or state.close or state.http10):
        known.streamed = lines


def cleaned_lines(flow: http.HTTPFlow) -> bytes:
    """The bytes of the head of a response."""
    response, known = flow.response, _cleaned(flow)
    assert response
    data = response.data
    return known.lines if known else response_bytes(data.status_code, data.reason, data.headers.fields)


def _cleaned(flow: http.HTTPFlow) -> Cleaned | None:
    """What is known of the head of a response, where nobody has changed it since."""
    head, response = state_of(flow).answer, flow.response
    known: Cleaned | None = head.cleaned if head else None
    return known if known and response and known.fields is response.data.headers.fields else None


_NOT_BACK = frozenset(
    {b"connection", b"proxy-authenticate", b"proxy-connection", b"keep-alive", b"proxy-authorization", b"alt-svc"}
)
_LINE_BREAK = re.compile(rb"\r\n|\r|\n")


@lru_cache(maxsize=512)
def _passes_back(name: bytes) -> bool:
    """Whether a response header is for the client: not of one hop (RFC 9110 section 7.6.1) and not ours."""
    lower = name.lower()
    return lower not in _NOT_BACK and lower != b"upgrade" and not lower.startswith(b"sallyport-")


def _is_upgrade(name: bytes) -> bool:
    return name.lower() == b"upgrade"


def _names(response: http.Response) -> set[bytes]:
    return {name.lower() for name, _ in response.data.headers.fields}


def _has_no_body(flow: http.HTTPFlow) -> bool:
    response = flow.response
    assert response
    return flow.request.data.method.upper() == b"HEAD" or response.data.status_code in (101, 204, 304)


def _frame(flow: http.HTTPFlow, response: http.Response) -> None:
    """A body that its upstream ends by closing is chunked: the client's connection is another one."""
    if flow.request.data.http_version[:6] != b"HTTP/1" or _has_no_body(flow):
        return
    if state_of(flow).http10:
        fields = response.headers
        if fields.pop("transfer-encoding", None) or "content-length" not in fields:
            fields["connection"] = "close"
    elif _FRAMING.isdisjoint(_names(response)):
        response.data.headers.fields += (_CHUNKED,)


_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_CHUNKED = (b"transfer-encoding", b"chunked")


def clean_response_trailers(flow: http.HTTPFlow, redactor: Replacer | None) -> None:
    """Redact the trailers of an HTTP/2 response."""
    if flow.response and flow.response.trailers and redactor:
        exchange = state_of(flow).exchange
        fields = _redacted_fields(flow.response.trailers.fields, redactor, exchange)
        flow.response.trailers = http.Headers(fields)


def _redacted_fields(fields: Iterable[Field], redactor: Replacer, exchange: Exchange | None) -> list[Field]:
    """Headers without secrets; what is left of a name that held one would be none, and is left out."""
    return [
        (name, _redacted(value, redactor, exchange))
        for name, value in fields
        if _redacted(name, redactor, exchange) == name
    ]


def clean_control_frame(flow: http.HTTPFlow, event: Event) -> Event:
    """A WebSocket's ping, pong or close with what it says redacted; of any other event nothing changes."""
    state = state_of(flow)
    if state.redactor is None:
        return event
    if isinstance(event, (Ping, Pong)):
        said = _redacted(bytes(event.payload), state.redactor, state.exchange, "websocket")
        return replace(event, payload=said[:MAX_CONTROL])
    if isinstance(event, CloseConnection) and event.reason:
        said = _redacted(event.reason.encode(), state.redactor, state.exchange, "websocket")
        return replace(event, reason=said[: MAX_CONTROL - 2].decode(errors="ignore"))  # behind a code of 2 bytes
    return event


def _redacted(value: bytes, redactor: Replacer, exchange: Exchange | None, where: str = "header") -> bytes:
    value, found = redactor.replace(value)
    if exchange:
        exchange.count_redacted(found, where)
    return value


def body_redactor(flow: http.HTTPFlow, redactor: Replacer) -> BodyRedactor | None:
    """What makes a streamed body safe; the head is changed to fit. None where there is no body.

    Raises Undecodable.
    """
    response = flow.response
    assert response
    if _has_no_body(flow):
        return None
    codings, fields = [], []
    for field in response.data.headers.fields:
        name = field[0].lower()
        if name == b"content-encoding":
            codings.append(field[1].decode("latin-1"))
        elif name not in NO_LONGER_TRUE:
            fields.append(field)
    body = BodyRedactor(redactor, ",".join(codings))
    if flow.request.data.http_version[:6] == b"HTTP/1":
        fields = [field for field in fields if field[0].lower() not in _FRAMING]
        fields.append((b"connection", b"close") if state_of(flow).http10 else _CHUNKED)
    response.data.headers = fast_headers(fields)
    return body


def redact_whole(flow: http.HTTPFlow, redactor: Replacer) -> bool:
    """Whether the body in `FlowState.whole` could be made safe as it is: one that is coded must be streamed."""
    state, response = state_of(flow), flow.response
    assert response
    assert state.whole is not None
    if _has_no_body(flow):
        return True
    fields, known = response.data.headers.fields, _cleaned(flow)
    if known.coded if known else _is_coded(fields):
        return False
    if redactor.finds(state.whole):
        state.whole = _redacted(state.whole, redactor, state.exchange, "body")
        kept = [field for field in fields if field[0].lower() not in NO_LONGER_TRUE]
        response.data.headers = fast_headers([*kept, (b"content-length", b"%d" % len(state.whole))])
    return True


def scan(body: BodyRedactor, chunk: bytes) -> list[bytes]:
    """What of a response body can be passed on after `chunk`; an empty one ends it.

    Raises Undecodable, also where a few bytes decode to so many that they could not be held for a slow client.
    """
    pieces, size = [], 0
    for piece in body.feed(chunk) if chunk else body.finish():
        pieces.append(piece)
        size += len(piece)
        if size > MAX_EXPANDED:
            raise Undecodable("a few bytes of the body decode to too many")
    return pieces
