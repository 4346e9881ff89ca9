"""Messages with descriptors, over a socket that may lie deep."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from proxy import handover
from proxy.problem import UserError


def test_a_message_arrives_with_its_descriptors(tmp_path: Path) -> None:
    """Also where the path is longer than the address of a socket may be."""
    state = tmp_path / ("deep" * 40)
    state.mkdir()
    listening, path = handover.listen(state)
    listening.setblocking(True)
    with listening, handover.connect(path) as client, open(os.devnull) as file:
        handover.send(client, {"agent": "coder-1"}, [file.fileno()])
        server, _ = listening.accept()
        with server:
            message = handover.receive(server)
            assert message
            assert message.data == {"agent": "coder-1"}
            (descriptor,) = message.descriptors
            assert not os.get_inheritable(descriptor)
            os.close(descriptor)


def test_the_end_and_a_refusal_are_told_apart() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            handover.send(theirs, {"error": "no agent"})
            with pytest.raises(UserError, match="no agent"):
                handover.ask(ours, {})
        with pytest.raises(ConnectionError):
            handover.ask(ours, {})


@pytest.mark.parametrize("data", [b"x", b"1", b"[1]", b"\xff"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, pytest.raises(ValueError, match="no"):
        theirs.send(data)
        handover.receive(ours)


def test_the_sockets_of_killed_processes_are_taken_away(tmp_path: Path) -> None:
    listening, path = handover.listen(tmp_path)
    left = path.with_name("1.sock")
    path.rename(left)
    listening.close()
    again, now = handover.listen(tmp_path)
    again.close()
    assert handover.sockets(tmp_path) == [now]


def test_the_folder_is_ours_alone(tmp_path: Path) -> None:
    handover.listen(tmp_path)[0].close()
    assert (tmp_path / handover.FOLDER).stat().st_mode & 0o077 == 0
    assert handover.sockets(tmp_path / "nowhere") == []
