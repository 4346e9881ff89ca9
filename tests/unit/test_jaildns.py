"""Every name has an address of the jail, and no bytes raise."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.jaildns import address_for, answer

A, AAAA, HTTPS = 1, 28, 65
INSIDE = ipaddress.ip_network("198.18.0.0/15")


def wire(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label) + b"\0"


def query(name: str, kind: int = A, flags: int = 0x0100) -> bytes:
    return struct.pack("!6H", 7, flags, 1, 0, 0, 0) + wire(name) + struct.pack("!2H", kind, 1)


def counts(response: bytes | None) -> tuple[int, int, int]:
    """Id, code and answers of a response that says it is one."""
    assert response
    number, flags, _, answers, *_ = struct.unpack_from("!6H", response)
    assert flags & 0x8000
    return number, flags & 15, answers


def test_a_name_gets_an_address_that_leads_to_the_proxy() -> None:
    response = answer(query("api.example.com"))
    assert response
    assert counts(response) == (7, 0, 1)
    assert ipaddress.ip_address(response[-4:]) in INSIDE
    assert response[12:-16] == query("api.example.com")[12:]


@pytest.mark.parametrize("kind", [AAAA, HTTPS, 16, 255])
def test_other_types_have_no_records(kind: int) -> None:
    """So a client goes on with IPv4 at once."""
    assert counts(answer(query("api.example.com", kind))) == (7, 0, 0)


def test_case_does_not_matter() -> None:
    assert address_for(wire("API.Example.com")) == address_for(wire("api.example.com"))


def test_localhost_is_the_jail_itself() -> None:
    assert address_for(wire("localhost")) == bytes([127, 0, 0, 1])


def test_other_operations_are_not_implemented() -> None:
    assert counts(answer(query("example.com", flags=0x2800))) == (7, 4, 0)  # UPDATE, RFC 2136


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 11, query("a.test", flags=0x8180), query("a.test")[:-1], query("a" * 64 + ".test")]
)
def test_what_is_no_query_is_not_answered(data: bytes) -> None:
    assert answer(data) is None


@given(st.binary(max_size=600))
def test_no_bytes_raise_and_no_answer_is_much_longer_than_its_question(data: bytes) -> None:
    response = answer(data)
    assert response is None or len(response) <= len(data) + 16


@given(st.binary(max_size=255))
def test_no_name_gets_an_address_of_the_proxy_itself(name: bytes) -> None:
    address = ipaddress.ip_address(address_for(name))
    assert address in INSIDE or address.is_loopback
    assert address not in ipaddress.ip_network("198.18.0.0/24")
