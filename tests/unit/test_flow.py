"""mitmproxy's flows become views, and views flows, without anything slipping through between."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from typing import Any

import pytest
from mitmproxy import http
from mitmproxy.test import tflow, tutils
from wsproto.events import CloseConnection, Ping, Pong, TextMessage

from proxy.address import Host
from proxy.agent import Agent
from proxy.coding import Undecodable
from proxy.exchange import Exchange, Injected
from proxy.flow import (
    STATE,
    FlowState,
    Tunnel,
    answer,
    body_redactor,
    clean_control_frame,
    clean_response_headers,
    clean_response_trailers,
    note_body_injections,
    proxy_authorization,
    refusal,
    scan,
    state_of,
    view_of,
    write_request,
)
from proxy.outbound import Opened
from proxy.policy import Answer, Decision, Edit, Rule
from proxy.reason import Reason
from proxy.redact import secret_replacer
from proxy.request import Ambiguous, Field, RequestView
from proxy.secret import Secret
from proxy.upstream import Refused

TUNNEL = Tunnel(Host("api.test"), 443, "coder-1", ("token",))
REDACTOR = secret_replacer({"key": [b"s3cret-value"]})


def request_flow(
    *headers: Field,
    method: bytes = b"GET",
    scheme: str = "",
    authority: str = "",
    path: bytes = b"/x?y",
    version: bytes = b"HTTP/1.1",
) -> http.HTTPFlow:
    """A flow as the layers leave it; `scheme` and `authority` are those of the request line."""
    request = tutils.treq(method=method, path=path, http_version=version, headers=http.Headers(headers))
    flow = tflow.tflow(req=request)
    flow.metadata[STATE] = FlowState(scheme, authority)
    return flow


def response_flow(*headers: Field, status: int = 200, reason: bytes = b"OK", **request: Any) -> http.HTTPFlow:
    flow = request_flow(**request)
    flow.response = tutils.tresp(status_code=status, reason=reason, headers=http.Headers(headers))
    state_of(flow).exchange = exchange()
    return flow


def exchange(**fields: Any) -> Exchange:
    return Exchange("01J", 0.0, "listener", "client", **fields)


def fields_of(flow: http.HTTPFlow) -> list[Field]:
    assert flow.response
    return list(flow.response.headers.fields)


# What is matched


def test_inside_a_tunnel_the_connect_says_where_to() -> None:
    view = view_of(request_flow((b"Host", b"API.test."), (b"a", b"b"), method=b"get"), TUNNEL)
    assert (view.method, view.scheme, view.authority) == ("GET", "https", "api.test")
    assert (view.path, view.query, view.headers) == ("/x", "y", ((b"a", b"b"),))


def test_without_a_tunnel_the_request_line_says_where_to() -> None:
    view = view_of(request_flow(scheme="http", authority="API.test:8080"), None)
    assert (view.scheme, view.authority) == ("http", "api.test:8080")
    assert view_of(request_flow(scheme="https", authority="api.test"), None).port == 443


@pytest.mark.parametrize("host", [b"api.test", b"API.TEST", b"api.test.", b"api.test:443", b" api.test ", b"api.test:"])
def test_a_host_header_may_spell_the_same_place_differently(host: bytes) -> None:
    assert view_of(request_flow((b"Host", host)), TUNNEL).authority == "api.test"


@pytest.mark.parametrize(
    ("flow", "tunnel"),
    [
        (request_flow((b"Host", b"other.test")), TUNNEL),
        (request_flow((b"Host", b"api.test:444")), TUNNEL),
        (request_flow((b"Host", b"api.test"), (b"hOST", b"other.test")), TUNNEL),
        (request_flow((b"Host", b"api.test"), authority="other.test"), TUNNEL),
        (request_flow((b"Host", b"api.test"), scheme="https", authority="other.test:443"), TUNNEL),
        (request_flow((b"Host", b"api.test"), scheme="http", authority="api.test:443"), TUNNEL),
        (request_flow((b"Host", b"other.test"), scheme="http", authority="api.test"), None),
        (request_flow((b"Host", b"api.test:443"), scheme="http", authority="api.test"), None),
        (request_flow(authority="other.test", version=b"HTTP/2.0"), TUNNEL),
    ],
)
def test_two_names_for_the_destination_are_a_mismatch(flow: http.HTTPFlow, tunnel: Tunnel | None) -> None:
    """The request line, the CONNECT, `:authority` and Host: whichever an origin believes must be the one decided."""
    with pytest.raises(Refused) as refused:
        view_of(flow, tunnel)
    assert refused.value.reason is Reason.AUTHORITY_MISMATCH


@pytest.mark.parametrize(
    ("flow", "tunnel"),
    [
        (request_flow(), TUNNEL),
        (request_flow(), None),
        (request_flow(scheme="http"), None),
        (request_flow(scheme="http", authority="u:p@api.test"), None),
        (request_flow(scheme="http", authority="api.test:0"), None),
        (request_flow(scheme="http", authority="2130706433"), None),
        (request_flow((b"Host", b"")), TUNNEL),
        (request_flow((b"Host", b"a b")), TUNNEL),
        (request_flow((b"Host", b"::1")), TUNNEL),
        (request_flow((b"Host", b"api.test"), path=b"*", method=b"OPTIONS"), TUNNEL),
        (request_flow((b"Host", b"api.test"), path=b"/a\r\nb"), TUNNEL),
        (request_flow((b"Host", b"api.test"), (b"a", b"b\r\nc: d")), TUNNEL),
        (request_flow((b"Host", b"api.test"), (b"content_length", b"1")), TUNNEL),
    ],
)
def test_a_request_that_names_no_place_or_is_malformed_is_ambiguous(flow: http.HTTPFlow, tunnel: Tunnel | None) -> None:
    with pytest.raises(Ambiguous):
        view_of(flow, tunnel)


def test_http2_and_http10_need_no_host() -> None:
    assert view_of(request_flow(authority="api.test", version=b"HTTP/2.0"), TUNNEL).authority == "api.test"
    flow = request_flow(version=b"HTTP/1.0")
    assert view_of(flow, TUNNEL).authority == "api.test"
    assert state_of(flow).http10
    assert state_of(flow).close


def test_another_scheme_is_not_forwarded() -> None:
    with pytest.raises(Refused) as refused:
        view_of(request_flow(scheme="ftp", authority="api.test"), None)
    assert refused.value.reason is Reason.PROTOCOL_NOT_ALLOWED


def test_a_wish_to_close_is_remembered() -> None:
    flow = request_flow((b"Host", b"api.test"), (b"Connection", b"close"))
    view_of(flow, TUNNEL)
    assert state_of(flow).close
    flow = request_flow((b"Host", b"api.test"))
    view_of(flow, TUNNEL)
    assert not state_of(flow).close


def test_every_proof_of_identity_is_seen() -> None:
    flow = request_flow((b"Proxy-Authorization", b"Bearer a"), (b"x", b"y"), (b"PROXY-AUTHORIZATION", b"Basic \xff"))
    assert proxy_authorization(flow) == ["Bearer a", "Basic ÿ"]


def test_a_flow_has_one_state() -> None:
    flow = tflow.tflow()
    state = state_of(flow)
    assert isinstance(state, FlowState)
    assert state_of(flow) is state
    assert not state.decided


# What is sent


def test_what_is_sent_is_the_view_and_nothing_else() -> None:
    flow = request_flow((b"Host", b"own.test"), (b"Cookie", b"own"), method=b"get", scheme="http", authority="own.test")
    view = RequestView.parse("POST", "https", Host("api.test"), 8443, "/v1?q", [(b"a", b"\xff")])
    write_request(flow, view, scanned=False)
    data = flow.request.data
    assert (data.method, data.scheme, data.host, data.port) == (b"POST", b"https", "api.test", 8443)
    assert (data.path, data.authority, data.http_version) == (b"/v1?q", b"", b"HTTP/1.1")
    assert data.headers.fields == ((b"Host", b"api.test:8443"), (b"a", b"\xff"))


def test_http2_names_the_place_in_its_authority() -> None:
    flow = request_flow((b"te", b"trailers"), (b"host", b"api.test"), authority="api.test", version=b"HTTP/2.0")
    write_request(flow, view_of(flow, TUNNEL), scanned=False)
    assert flow.request.data.authority == b"api.test"
    assert flow.request.data.headers.fields == ((b"te", b"trailers"),)


def test_http10_is_sent_as_http11() -> None:
    flow = request_flow(version=b"HTTP/1.0")
    write_request(flow, view_of(flow, TUNNEL), scanned=False)
    assert flow.request.data.http_version == b"HTTP/1.1"
    assert flow.request.data.headers.fields == ((b"Host", b"api.test"),)


def test_a_websocket_asks_its_upstream_to_upgrade() -> None:
    fields = ((b"Host", b"api.test"), (b"Connection", b"keep-alive, Upgrade"), (b"Upgrade", b"WebSocket"))
    flow = request_flow(*fields)
    write_request(flow, view_of(flow, TUNNEL), scanned=False)
    assert flow.request.data.headers.fields == (
        (b"Host", b"api.test"),
        (b"Connection", b"Upgrade"),
        (b"Upgrade", b"websocket"),
    )


def test_a_header_added_later_cannot_be_named_in_connection() -> None:
    """It was read before; else `Connection: authorization` would strip the credential."""
    flow = request_flow((b"Host", b"api.test"), (b"Connection", b"authorization"), (b"Authorization", b"own"))
    view = view_of(flow, TUNNEL)
    assert view.headers == ()
    with_credential = RequestView.parse("GET", "https", Host("api.test"), 443, "/", [(b"authorization", b"Bearer x")])
    write_request(flow, with_credential, scanned=False)
    assert flow.request.data.headers.fields == ((b"Host", b"api.test"), (b"authorization", b"Bearer x"))


def test_a_response_to_be_scanned_is_asked_for_whole_and_readable() -> None:
    fields = ((b"Accept-Encoding", b"zz, br;q=0.5"), (b"Range", b"bytes=0-5"), (b"If-Range", b"x"), (b"a", b"b"))
    flow = request_flow((b"Host", b"api.test"), *fields)
    view = view_of(flow, TUNNEL)
    write_request(flow, view, scanned=True)
    assert flow.request.data.headers.fields == (
        (b"Host", b"api.test"),
        (b"a", b"b"),
        (b"Accept-Encoding", b"br;q=0.5"),
    )
    write_request(flow, view, scanned=False)
    assert flow.request.data.headers.fields == ((b"Host", b"api.test"), *fields)


def test_placeholders_found_in_a_body_go_on_record() -> None:
    state = FlowState(exchange=exchange())
    state.body_credentials = tuple(Opened(name, 2, "placeholder", {}, Secret(b"x")) for name in ("one", "two"))
    note_body_injections(state, Counter({"two": 3}))
    assert state.exchange
    assert state.exchange.injected == (Injected("two", 2, "placeholder:body"),)


# Refusals and answers


def test_a_refusal_tells_the_agent_what_and_why() -> None:
    rule = Rule("walls", "/etc/rules.yaml:3")
    view = RequestView.parse("DELETE", "https", Host("api.test"), 443, "/x{agent}?token=1")
    refused = Refused(Reason.BLOCKED, decision=Decision(rule=rule))
    response = refusal(refused, exchange(agent=Agent("coder-1")), view)
    assert response.status_code == 403
    assert response.headers["sallyport-decision"] == "block; reason=blocked; id=01J"
    assert response.headers["content-type"] == "application/json"
    assert response.headers["content-length"] == str(len(response.raw_content or b""))
    assert json.loads(response.text or "") == {
        "error": {
            "code": "blocked",
            "message": "A rule forbids coder-1 to DELETE api.test/x%7Bagent%7D.",
            "agent": "coder-1",
            "rule": "walls",
            "request_id": "01J",
            "hint": "Do not try this again.",
        }
    }


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_makes_an_answer(reason: Reason) -> None:
    response = refusal(Refused(reason, "why"), exchange(), None)
    assert response.status_code == reason.status
    assert ("proxy-authenticate" in response.headers) is (reason.status == 407)
    assert ("retry-after" in response.headers) is (reason.status in (429, 503))
    error = json.loads(response.text or "")["error"]
    assert (error["code"], error["agent"], error["rule"]) == (reason, None, None)


def test_an_agent_nobody_knows_is_not_named() -> None:
    response = refusal(Refused(Reason.NO_RULE), exchange(method="GET", host="api.test"), None)
    message = json.loads(response.text or "")["error"]["message"]
    assert message == "No rule allows An unknown agent to GET api.test."


def test_a_rules_own_answer_has_the_length_of_its_body() -> None:
    given = Answer(201, {"Content-Length": "99", "transfer-encoding": "chunked", "connection": "x", "x-a": "ä"}, "ü")
    response = answer(given)
    assert (response.status_code, response.raw_content) == (201, "ü".encode())
    assert response.headers.fields == ((b"x-a", b"\xe4"), (b"content-length", b"2"))


# Responses


def test_what_is_ours_or_of_one_hop_is_stripped_from_a_response() -> None:
    kept = ((b"a", b"b"), (b"content-length", b"1"), (b"Set-Cookie", b"c"))
    dropped = (
        "Connection",
        "Keep-Alive",
        "Proxy-Authenticate",
        "Alt-Svc",
        "Upgrade",
        "Sallyport-Decision",
        "sallyport-x",
    )
    flow = response_flow(*kept, *((name.encode(), b"x") for name in dropped))
    clean_response_headers(flow, (), None)
    assert fields_of(flow) == list(kept)


def test_a_rule_edits_the_headers_of_a_response() -> None:
    flow = response_flow((b"Set-Cookie", b"a"), (b"set_cookie", b"b"), (b"content-length", b"1"))
    clean_response_headers(flow, [Edit(remove=("set-cookie",)), Edit(set={"x-a": "b"})], None)
    assert fields_of(flow) == [(b"content-length", b"1"), (b"x-a", b"b")]


def test_a_secret_in_a_head_is_redacted_and_counted() -> None:
    flow = response_flow(
        (b"x-echo", b"Bearer s3cret-value"),
        (b"location", b"/s3cret-value"),
        (b"content-length", b"1"),
        reason=b"s3cret-value",
    )
    clean_response_headers(flow, [Edit(set={"x-set": "s3cret-value"})], REDACTOR)
    assert b"s3cret" not in repr(flow.response.data if flow.response else "").encode()
    assert flow.response
    assert flow.response.headers["x-echo"] == "Bearer [redacted:key]"
    assert flow.response.reason == "[redacted:key]"
    found = state_of(flow).exchange
    assert found
    assert found.redacted == {("key", "header"): 4}


def test_a_folded_value_becomes_one_line() -> None:
    flow = response_flow((b"a", b"b\r\n c\nd\re"), (b"content-length", b"1"))
    clean_response_headers(flow, (), None)
    assert fields_of(flow)[0] == (b"a", b"b  c d e")


@pytest.mark.parametrize(
    ("headers", "status", "request_fields", "framing"),
    [
        ([], 200, {}, [(b"transfer-encoding", b"chunked")]),
        ([(b"Content-Length", b"5")], 200, {}, [(b"Content-Length", b"5")]),
        ([(b"Transfer-Encoding", b"chunked")], 200, {}, [(b"Transfer-Encoding", b"chunked")]),
        ([], 204, {}, []),
        ([], 304, {}, []),
        ([], 200, {"method": b"HEAD"}, []),
        ([], 200, {"version": b"HTTP/2.0"}, []),
        ([(b"Connection", b"close")], 200, {}, [(b"transfer-encoding", b"chunked")]),
    ],
)
def test_a_response_is_framed_for_the_clients_own_connection(
    headers: list[Field], status: int, request_fields: dict[str, bytes], framing: list[Field]
) -> None:
    flow = response_flow(*headers, status=status, **request_fields)
    clean_response_headers(flow, (), None)
    assert fields_of(flow) == framing


def test_an_http10_client_is_sent_no_chunks() -> None:
    flow = response_flow((b"Transfer-Encoding", b"chunked"), version=b"HTTP/1.0")
    state_of(flow).http10 = True
    clean_response_headers(flow, (), None)
    assert fields_of(flow) == [(b"connection", b"close")]


def test_a_switch_of_protocols_keeps_its_headers() -> None:
    flow = response_flow((b"Upgrade", b"websocket"), (b"Connection", b"upgrade"), status=101)
    clean_response_headers(flow, (), None)
    assert fields_of(flow) == [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]


def test_a_secret_in_trailers_is_redacted() -> None:
    flow = response_flow(version=b"HTTP/2.0")
    assert flow.response
    flow.response.trailers = http.Headers([(b"grpc-message", b"s3cret-value")])
    clean_response_trailers(flow, None)
    clean_response_trailers(flow, REDACTOR)
    assert flow.response.trailers.fields == ((b"grpc-message", b"[redacted:key]"),)


def test_a_secret_in_a_control_frame_is_redacted() -> None:
    """It still fits into one (RFC 6455 section 5.5)."""
    flow = response_flow()
    assert clean_control_frame(flow, Ping(b"s3cret-value")) == Ping(b"s3cret-value")
    state_of(flow).redactor = REDACTOR
    assert clean_control_frame(flow, Ping(b"s3cret-value")) == Ping(b"[redacted:key]")
    assert clean_control_frame(flow, Pong(b"x" * 112 + b"s3cret-value")) == Pong(b"x" * 112 + b"[redacted:key]"[:13])
    closing = clean_control_frame(flow, CloseConnection(1000, "s3cret-value"))
    assert closing == CloseConnection(1000, "[redacted:key]")
    assert clean_control_frame(flow, CloseConnection(1000)) == CloseConnection(1000)
    assert clean_control_frame(flow, TextMessage("s3cret-value")) == TextMessage("s3cret-value")


def test_a_body_to_be_scanned_is_decoded_and_framed_anew() -> None:
    flow = response_flow(
        (b"Content-Encoding", b"gzip"),
        (b"Content-Length", b"9"),
        (b"Content-Digest", b"x"),
        (b"Accept-Ranges", b"bytes"),
    )
    body = body_redactor(flow, REDACTOR)
    assert body
    assert fields_of(flow) == [(b"transfer-encoding", b"chunked")]
    pieces = [*body.feed(gzip.compress(b"a s3cret-value b")), *body.finish()]
    assert b"".join(pieces) == b"a [redacted:key] b"


def test_an_http2_body_to_be_scanned_needs_no_framing() -> None:
    flow = response_flow((b"content-length", b"9"), version=b"HTTP/2.0")
    assert body_redactor(flow, REDACTOR)
    assert fields_of(flow) == []


@pytest.mark.parametrize(("status", "method"), [(204, b"GET"), (304, b"GET"), (101, b"GET"), (200, b"HEAD")])
def test_where_there_is_no_body_there_is_nothing_to_scan(status: int, method: bytes) -> None:
    flow = response_flow((b"content-length", b"9"), (b"content-encoding", b"gzip"), status=status, method=method)
    assert body_redactor(flow, REDACTOR) is None
    assert fields_of(flow) == [(b"content-length", b"9"), (b"content-encoding", b"gzip")]


def test_a_body_that_explodes_is_not_held() -> None:
    """A slow client must not make us keep what a few bytes decode to."""
    flow = response_flow((b"content-encoding", b"gzip"))
    body = body_redactor(flow, REDACTOR)
    assert body
    bomb = gzip.compress(b"\0" * 64_000_000)
    with pytest.raises(Undecodable):
        scan(body, bomb)
    body = body_redactor(response_flow(), REDACTOR)
    assert body
    assert scan(body, b"a s3cret-value b") + scan(body, b"") == [b"a [redacted:key] b"]
