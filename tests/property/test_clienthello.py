"""No bytes make the reader of ClientHellos do anything but answer, wait or refuse; what it answers, others read too."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mitmproxy.proxy.layers.tls import parse_client_hello as reference

from proxy.clienthello import ClientHello, parse_client_hello
from tests.unit.test_clienthello import REAL, made, name_list

LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
PROTOCOLS = st.lists(st.sampled_from([b"h2", b"http/1.1", b"\x5a\x5a"]) | st.binary(min_size=1, max_size=9), min_size=1)
OTHERS = st.dictionaries(st.integers(60, 0xFFFF), st.binary(max_size=40), max_size=4)


def read(data: bytes) -> ClientHello | type[ValueError] | None:
    try:
        return parse_client_hello(data)
    except ValueError:
        return ValueError


def agree(data: bytes) -> None:
    """Where both answer, they answer the same; mitmproxy's parser takes more."""
    ours = read(data)
    if not isinstance(ours, ClientHello):
        return
    theirs = reference(data)
    assert theirs
    assert tuple(theirs.alpn_protocols) == ours.protocols
    assert theirs.sni in (ours.server_name, None)  # mitmproxy has none where the name is no host


@given(NAMES | st.none(), PROTOCOLS | st.none(), OTHERS, st.randoms())
def test_what_a_client_asks_for_is_found_in_any_order(
    name: str | None, protocols: list[bytes] | None, others: dict[int, bytes], random: Random
) -> None:
    extensions = list(others.items())
    if name is not None:
        extensions.append((0, name_list(name.encode())))
    if protocols is not None:
        offered = b"".join(bytes([len(protocol)]) + protocol for protocol in protocols)
        extensions.append((16, len(offered).to_bytes(2) + offered))
    random.shuffle(extensions)
    data = made(*extensions)
    assert parse_client_hello(data) == ClientHello(name, tuple(protocols or ()), encrypted=0xFE0D in others)
    agree(data)


@pytest.mark.parametrize("case", ["a name", "h2 and http/1.1", "GREASE around everything", "no extensions"])
@given(st.data())
def test_a_hello_with_wrong_bytes_is_refused_or_read_alike(case: str, data: st.DataObject) -> None:
    hello = bytearray(REAL[case])
    for at in data.draw(st.lists(st.integers(0, len(hello) - 1), min_size=1, max_size=3)):
        hello[at] = data.draw(st.integers(0, 255))
    agree(bytes(hello))


@given(st.binary(max_size=80))
def test_any_bytes_are_answered(data: bytes) -> None:
    agree(data)


@given(st.binary(max_size=80))
def test_so_is_any_body(body: bytes) -> None:
    agree(made(body=body))


@given(st.binary(max_size=60))
def test_so_are_any_extensions(packed: bytes) -> None:
    body = b"\x03\x03" + bytes(32) + b"\x00\x00\x02\x13\x01\x01\x00" + len(packed).to_bytes(2) + packed
    agree(made(body=body))
