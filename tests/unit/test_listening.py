"""Listening sockets."""

from __future__ import annotations

import contextlib
import socket

import pytest

from proxy.listening import address_of, bind
from proxy.problem import UserError
from proxy.settingvalue import parse_listener


def test_the_kernel_may_choose_the_port() -> None:
    (sock,) = bind(parse_listener("127.0.0.1:0"))
    with sock:
        assert address_of(sock) == f"127.0.0.1:{sock.getsockname()[1]}"
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_of_ipv6_is_in_brackets() -> None:
    (sock,) = bind(parse_listener("[::1]:0"))
    with sock:
        assert address_of(sock) == f"[::1]:{sock.getsockname()[1]}"


def test_a_port_in_use_says_what_to_do() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"listen 127.0.0.1:{port}: the port is in use; stop what uses it"):
            bind(parse_listener(f"127.0.0.1:{port}"))


def test_an_address_of_another_host_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"set listen: to an address of this host"):
        bind(parse_listener("192.0.2.1:0"))
