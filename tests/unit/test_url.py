"""URLs as people write them."""

from __future__ import annotations

import pytest

from proxy.problem import UserError
from proxy.request import Ambiguous
from proxy.url import parse_url, url_of


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://EXAMPLE.com.:443/a/../b", "https://example.com/b"),
        ("http://example.com:8080?q=1#fragment", "http://example.com:8080/?q=1"),
        ("http://example.com:443/", "http://example.com:443/"),
        ("https://bücher.example/ü?q=ü", "https://xn--bcher-kva.example/%C3%BC?q=%C3%BC"),
        ("https://[2001:DB8::1]:8443/", "https://[2001:db8::1]:8443/"),
        ("https://[::1]", "https://[::1]/"),
        ("https://example.com:/a b", "https://example.com/a%20b"),
        ("https://example.com/a//b?x=@/?", "https://example.com/a//b?x=@/?"),
    ],
)
def test_a_url_is_read_as_a_client_would(url: str, normal: str) -> None:
    assert url_of(parse_url("GET", url)) == normal


@pytest.mark.parametrize(
    "url",
    [
        "https://user@example.com/",
        "https://user:password@example.com/",
        "https://example.com\\@other.test/",
        "https://exa mple.com/",
        "https://example.com:http/",
        "https://example.com:0/",
        "https://::1/",
        "https://[::1/",
        "https:///path",
        "https://0x7f.1/",
        "https://example.com/%",
        "https://example.com/a\tb",
        "https://example.com/\udcfc",  # an octet of argv that is not UTF-8
    ],
)
def test_what_the_proxy_would_refuse_is_ambiguous(url: str) -> None:
    with pytest.raises(Ambiguous):
        parse_url("GET", url)


@pytest.mark.parametrize(
    "url", ["", "example.com", "/path", "ftp://example.com/", "https:example.com", "wss://a.test/"]
)
def test_what_is_no_url_is_the_users_mistake(url: str) -> None:
    with pytest.raises(UserError, match="write it whole"):
        parse_url("GET", url)


def test_headers_and_method_arrive() -> None:
    view = parse_url("post", "https://example.com/", [("X-A", "ü"), ("Upgrade", "H2C")])
    assert view.method == "POST"
    assert view.headers[0] == (b"X-A", "ü".encode())
    assert view.upgrade == "h2c"


def test_a_header_that_would_split_the_request_is_ambiguous() -> None:
    with pytest.raises(Ambiguous):
        parse_url("GET", "https://example.com/", [("x", "a\r\nb: c")])
