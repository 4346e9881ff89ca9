"""One host has one form, and only public addresses may be dialled on DNS's word."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from proxy.address import Host, HostPattern, ip_literal, is_public, parse_authority, unmapped


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("example.com", "example.com"),
        ("EXAMPLE.com.", "example.com"),
        ("example.com\u3002", "example.com"),
        ("bücher.test", "xn--bcher-kva.test"),
        ("BU\u0308CHER.test", "xn--bcher-kva.test"),
        ("XN--BCHER-KVA.test", "xn--bcher-kva.test"),
        ("faß.test", "xn--fa-hia.test"),
        ("ⓔxample.com", "example.com"),
        ("exa\u00admple.com", "example.com"),
        ("exa\u200bmple.com", "example.com"),
        ("_dmarc.a-b.test", "_dmarc.a-b.test"),
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1.", "127.0.0.1"),
        ("\uff11\uff12\uff17.0.0.1", "127.0.0.1"),
        ("127。0\uff0e0｡1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("[0:0:0:0:0:0:0:1]", "::1"),
        ("[2001:DB8::0:7]", "2001:db8::7"),
        ("[::ffff:127.0.0.1]", "127.0.0.1"),
        ("[::ffff:7f00:1]", "127.0.0.1"),
    ],
)
def test_every_spelling_of_a_host_has_one_form(text: str, name: str) -> None:
    host = Host.parse(text)
    assert host.name == name
    assert host.ip == ip_literal(name)
    assert Host.parse(str(host)) is Host.parse(str(host))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a..b",
        "example.com..",
        "-a.test",
        "a-.test",
        "a b.test",
        "a@b.test",
        "a/b.test",
        "a?b.test",
        "a\\b.test",
        "a%41.test",
        "a\0.test",
        "a\n.test",
        "*.test",
        "a\uff1a80.test",
        "a\uff0fb.test",
        "a\u200d.test",
        "℀.test",
        "a" * 64 + ".test",
        "a." * 126 + "test",
        "ü" * 60 + ".test",
        "\u00ad" * 2000 + "a.test",
        "[a.test]",
        "[127.0.0.1]",
        "[::1",
        "::1]",
        "[::1].",
        "[::1%eth0]",
        "[::1%25eth0]",
        "[v1.a]",
        "a.test:80",
    ],
)
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the words are partly those of ipaddress
        Host.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "127.1",
        "0177.0.0.1",
        "127.0.0.01",
        "127.0.0.256",
        "a.0x7f",
        "\uff10x7f.1",
        "0x",
    ],
)
def test_a_number_that_some_resolver_reads_as_an_address_is_no_name(text: str) -> None:
    """inet_aton takes all of them for 127.0.0.1 or something like it."""
    with pytest.raises(ValueError):  # noqa: PT011  # the words are partly those of ipaddress
        Host.parse(text)


@pytest.mark.parametrize(
    ("pattern", "hosts", "others"),
    [
        ("a.test", ["a.test"], ["b.a.test", "xa.test", "a.test.evil.test", "test"]),
        ("*.a.test", ["b.a.test"], ["a.test", "c.b.a.test", "ba.test", ".a.test"]),
        ("**.a.test", ["b.a.test", "c.b.a.test"], ["a.test", "ba.test", "a.test.b.test"]),
        ("**", ["a.test", "10.0.0.1", "::1"], []),
        ("10.0.0.1", ["10.0.0.1"], ["10.0.0.10", "110.0.0.1"]),
        ("::1", ["::1"], ["::2"]),
        ("[::1]", ["::1"], ["::2"]),
    ],
)
def test_a_pattern_matches_its_hosts_only(pattern: str, hosts: list[str], others: list[str]) -> None:
    parsed = HostPattern.parse(pattern)
    assert all(parsed.matches(Host.parse(host)) for host in hosts)
    assert not any(parsed.matches(Host(host, ip_literal(host))) for host in others)


def test_a_wildcard_never_matches_an_address() -> None:
    assert not HostPattern("0.0.1", 1).matches(Host.parse("10.0.0.1"))
    assert not HostPattern("0.1", 2).matches(Host.parse("10.0.0.1"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("Example.com", 'write "example.com"'),
        ("example.com.", 'write "example.com"'),
        ("*.Example.com", 'write "*.example.com"'),
        ("bücher.test", 'write "xn--bcher-kva.test"'),
        ("[::0:1]", 'write "::1"'),
        ("*.10.0.0.1", 'write "10.0.0.1"'),
        ("a.*.test", 'a wildcard is written "*.example.com", "**.example.com" or "**"'),
        ("*", 'a wildcard is written "*.example.com", "**.example.com" or "**"'),
        ("***.a.test", 'a wildcard is written "*.example.com", "**.example.com" or "**"'),
        ("*a.test", 'a wildcard is written "*.example.com", "**.example.com" or "**"'),
        ("a.test:443", ""),
    ],
)
def test_a_pattern_in_another_form_is_refused_with_the_right_spelling(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=r"is not|no wildcard") as refused:
        HostPattern.parse(text)
    assert refused.value.args[1] == hint


@pytest.mark.parametrize("text", ["a.test", "*.a.test", "**.a.test", "**", "10.0.0.1"])
def test_a_pattern_is_shown_as_it_is_written(text: str) -> None:
    assert str(HostPattern.parse(text)) == text


# IANA's special-purpose registries (RFC 6890), and what has one of their addresses inside.
NOT_PUBLIC = {
    "0.0.0.0": "this host (RFC 791)",
    "0.1.2.3": "this network (RFC 791)",
    "10.1.2.3": "private (RFC 1918)",
    "100.64.0.1": "shared (RFC 6598)",
    "100.127.255.255": "shared (RFC 6598)",
    "127.0.0.1": "loopback (RFC 1122)",
    "127.255.255.254": "loopback (RFC 1122)",
    "169.254.169.254": "link-local, metadata services (RFC 3927)",
    "172.16.0.1": "private (RFC 1918)",
    "172.31.255.255": "private (RFC 1918)",
    "192.0.0.1": "protocol assignments (RFC 6890)",
    "192.0.0.8": "dummy address (RFC 7600)",
    "192.0.0.9": "port control protocol anycast (RFC 7723)",
    "192.0.0.170": "NAT64 discovery (RFC 7050)",
    "192.0.2.1": "documentation (RFC 5737)",
    "192.88.99.1": "6to4 relay anycast (RFC 7526)",
    "192.168.0.1": "private (RFC 1918)",
    "198.18.0.1": "benchmarking (RFC 2544)",
    "198.19.255.255": "benchmarking (RFC 2544)",
    "198.51.100.1": "documentation (RFC 5737)",
    "203.0.113.1": "documentation (RFC 5737)",
    "168.63.129.16": "metadata of Azure's machines, at a public address",
    "224.0.0.1": "multicast (RFC 5771)",
    "239.255.255.255": "multicast (RFC 5771)",
    "240.0.0.1": "reserved (RFC 1112)",
    "255.255.255.255": "broadcast (RFC 919)",
    "::": "unspecified (RFC 4291)",
    "::1": "loopback (RFC 4291)",
    "::8.8.8.8": "IPv4-compatible, deprecated (RFC 4291)",
    "::127.0.0.1": "IPv4-compatible, deprecated (RFC 4291)",
    "::ffff:127.0.0.1": "IPv4-mapped (RFC 4291)",
    "::ffff:10.0.0.1": "IPv4-mapped (RFC 4291)",
    "::ffff:0:8.8.8.8": "IPv4-translated (RFC 2765)",
    "64:ff9b::10.0.0.1": "NAT64 (RFC 6052)",
    "64:ff9b::169.254.169.254": "NAT64 (RFC 6052)",
    "64:ff9b:1::8.8.8.8": "NAT64 of this network, any prefix length (RFC 8215)",
    "64:ff9b:1:7f00:0:100:808:808": "the same with 127.0.0.1 behind 48 bits (RFC 6052 section 2.2)",
    "100::1": "discard (RFC 6666)",
    "100:0:0:1::1": "dummy prefix (RFC 9780)",
    "2001::1": "Teredo (RFC 4380)",
    "2001:0:808:808::f7f7:f7f7": "Teredo of public addresses",
    "2001:1::1": "port control protocol anycast (RFC 7723)",
    "2001:2::1": "benchmarking (RFC 5180)",
    "2001:3::1": "AMT (RFC 7450)",
    "2001:4:112::1": "AS112 (RFC 7535)",
    "2001:10::1": "ORCHID (RFC 4843)",
    "2001:20::1": "ORCHIDv2 (RFC 7343)",
    "2001:30::1": "drone identities (RFC 9374)",
    "2001:db8::1": "documentation (RFC 3849)",
    "2002:7f00:1::1": "6to4 of loopback (RFC 3056)",
    "2002:a00:1::1": "6to4 of a private address (RFC 3056)",
    "3fff::1": "documentation (RFC 9637)",
    "3fff:fff::1": "documentation (RFC 9637)",
    "4000::1": "not assigned",
    "5f00::1": "segment routing (RFC 9602)",
    "fc00::1": "unique local (RFC 4193)",
    "fdff::1": "unique local (RFC 4193)",
    "fe80::1": "link-local (RFC 4291)",
    "fec0::1": "site-local, deprecated (RFC 3879)",
    "feff::1": "site-local, deprecated (RFC 3879)",
    "ff02::1": "multicast (RFC 4291)",
    "ff0e::1": "multicast of global scope (RFC 4291)",
}


@pytest.mark.parametrize("text", NOT_PUBLIC, ids=NOT_PUBLIC.get)
def test_a_special_address_is_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.1",
        "100.63.255.255",
        "100.128.0.1",
        "172.32.0.1",
        "192.0.1.1",
        "198.17.255.255",
        "198.20.0.1",
        "223.255.255.254",
        "2001:200::1",
        "2001:4860:4860::8888",
        "2606:4700:4700::1111",
        "2002:808:808::1",
        "64:ff9b::8.8.8.8",
        "::ffff:8.8.8.8",
        "3ffe::1",
    ],
)
def test_an_address_beside_the_special_ones_is_public(text: str) -> None:
    assert is_public(ip_address(text))


def test_a_mapped_address_is_the_one_inside() -> None:
    assert unmapped(ip_address("::ffff:10.0.0.1")) == ip_address("10.0.0.1")
    assert unmapped(ip_address("10.0.0.1")) == ip_address("10.0.0.1")
    assert unmapped(ip_address("::1")) == ip_address("::1")


def test_an_authority_is_a_host_and_a_port() -> None:
    assert parse_authority("A.test:443") == (Host("a.test"), 443)
    assert parse_authority("[::1]:65535") == (Host("::1", ip_address("::1")), 65535)


@pytest.mark.parametrize(
    "text",
    [
        "a.test",
        "a.test:",
        ":443",
        "a.test:0",
        "a.test:65536",
        "a.test:000443",
        "a.test:-1",
        "a.test:+1",
        "a.test:4 43",
        "a.test:\uff14\uff14\uff13",
        "a.test:443:443",
        "u@a.test:443",
        "::1:443",
        "[::1:443",
        "[::1]x:443",
        "[a.test]:443",
    ],
)
def test_other_text_is_no_authority(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the words are partly those of ipaddress
        parse_authority(text)


def test_a_name_is_no_address() -> None:
    assert ip_literal("a.test") is None
    assert ip_literal("127.1") is None
