"""A connection that nobody redirected has no other port than its own. Redirected ones are in tests/wire."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from proxy.redirect import original_port


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_direct_connection_was_not_redirected(family: int, host: str) -> None:
    with closing(socket.create_server((host, 0), family=family)) as server:
        address = server.getsockname()[:2]
        with closing(socket.create_connection(address)):
            accepted, _ = server.accept()
            with closing(accepted):
                assert original_port(accepted) == 0
