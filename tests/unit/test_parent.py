"""The parent proxy's URL, what it is told and what it may answer."""

from __future__ import annotations

import base64
import logging

import pytest

from proxy.address import Host
from proxy.parent import MAX_ANSWER, Declined, Parent, parse_parent
from proxy.settingvalue import Endpoint

PASSWORD = "hunter2-of-the-parent"
HOST = Host("api.example.com")


def parsed(url: str) -> Parent:
    parent = parse_parent(url)
    assert parent
    return parent


def proof(connect: bytes) -> str:
    """The user and password in a CONNECT."""
    (line,) = [line for line in connect.split(b"\r\n") if line.startswith(b"Proxy-Authorization: Basic ")]
    return base64.b64decode(line.rpartition(b" ")[2]).decode()


@pytest.mark.parametrize(
    ("url", "endpoint", "credentials"),
    [
        ("http://proxy.example.com:3128", ("proxy.example.com", 3128), ""),
        ("HTTP://Proxy.Example.com.:3128/", ("proxy.example.com", 3128), ""),
        ("http://u:p@10.0.0.1:80", ("10.0.0.1", 80), "u:p"),
        ("http://u@[2001:db8::1]:80", ("2001:db8::1", 80), "u:"),
        ("http://dom%5Cu:p%40%2F%3A%25@h.example:1", ("h.example", 1), "dom\\u:p@/:%"),
        ("http://u:a:b@h.example:1", ("h.example", 1), "u:a:b"),
        ("http://u:%0d%0aX: y@h.example:1".replace(" ", "%20"), ("h.example", 1), "u:\r\nX: y"),
    ],
)
def test_a_url_says_where_and_as_whom(url: str, endpoint: tuple[str, int], credentials: str) -> None:
    """What is escaped in it can be anything; base64 carries it."""
    parent = parsed(url)
    assert parent.endpoint == Endpoint(Host.parse(endpoint[0]), endpoint[1])
    connect = parent.connect(HOST, 443)
    assert connect.startswith(b"CONNECT api.example.com:443 HTTP/1.1\r\nHost: api.example.com:443\r\n")
    assert connect.endswith(b"\r\n\r\n")
    assert connect.count(b"\r\n\r\n") == 1
    assert (proof(connect) if credentials else "") == credentials


def test_an_ipv6_target_has_brackets() -> None:
    """As a CONNECT target must (RFC 9110 section 7.1)."""
    assert b"CONNECT [2001:db8::1]:443 " in parsed("http://h.example:1").connect(Host.parse("2001:db8::1"), 443)


@pytest.mark.parametrize(
    "url",
    [
        *("https://h.example:1", "socks5://h.example:1", "h.example:1", "", "http://", "http://h.example"),
        *("http://h.example:0", "http://h.example:x", "http://h.example:1/path", "http://h.example:1?q"),
        *(f"http://u:{PASSWORD}@", f"http://u:{PASSWORD}/@h.example:1", f"http://u:{PASSWORD}@@h.example:1"),
        *(f"http://:{PASSWORD}@h.example:1", f"http://u%3Au:{PASSWORD}@h.example:1", f"http://u:{PASSWORD}@h:x"),
        *(f"http://u:{PASSWORD} @h.example:1", f"http://u:{PASSWORD}\r\n@h.example:1", f"https://u:{PASSWORD}@h:1"),
    ],
)
def test_a_url_that_is_none_is_refused_without_its_password(url: str) -> None:
    """The message goes to a terminal, or to a log."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse_parent(url)
    assert PASSWORD not in str(caught.value.args)


def test_its_text_hides_user_and_password() -> None:
    parent = parsed(f"http://somebody:{PASSWORD}@h.example:1")
    assert (str(parent), repr(parent)) == ("http://h.example:1", "Parent('http://h.example:1')")


def test_an_answer_is_whole_before_it_is_judged() -> None:
    """Byte by byte."""
    answer = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 p\r\n\r\n"
    parent = parsed("http://h.example:1")
    assert not any(parent.accepted(answer[:end]) for end in range(len(answer)))
    assert parent.accepted(answer)
    assert parent.accepted(b"HTTP/1.0 204\r\n\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 403 Forbidden\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nlocation: http://portal.example\r\n\r\n",
        b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"x" * MAX_ANSWER,
    ],
)
def test_anything_else_is_no_tunnel(answer: bytes) -> None:
    """A page of the parent is not the upstream's answer."""
    with pytest.raises(Declined):
        parsed("http://h.example:1").accepted(answer)


def test_wrong_credentials_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A sandbox must not be able to fill the log; when they worked in between it is told again."""
    parent = parsed(f"http://somebody:{PASSWORD}@h.example:1")
    with caplog.at_level(logging.ERROR):
        for status in (407, 407, 200, 407):
            try:
                parent.accepted(b"HTTP/1.1 %d X\r\n\r\n" % status)
            except Declined:
                assert status == 407
    assert len(caplog.records) == 2
    assert PASSWORD not in caplog.text
    assert "somebody" not in caplog.text
