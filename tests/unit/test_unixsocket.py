"""Unix sockets are bound for whom they are meant, and nothing that is in use is taken away."""

from __future__ import annotations

import grp
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from proxy.problem import UserError
from proxy.unixsocket import bind_unix, peer_of, remove


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Short: it has 107 bytes at most."""
    path = tmp_path_factory.mktemp("u") / "s"
    yield str(path)
    remove(str(path))


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_it_has_its_mode_whatever_the_umask(path: str, mode: int) -> None:
    before = os.umask(0o000)
    try:
        with closing(bind_unix(path, mode, "", 1)):
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
    finally:
        os.umask(before)


def test_the_other_end_is_told_by_the_kernel(path: str) -> None:
    with closing(bind_unix(path, 0o600, "", 1)) as server, closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(path)
        accepted, _ = server.accept()
        with closing(accepted):
            assert peer_of(accepted) == (os.getpid(), os.getuid())


def test_a_stale_one_is_replaced_and_a_live_one_is_not(path: str) -> None:
    bind_unix(path, 0o600, "", 1).close()
    with closing(bind_unix(path, 0o600, "", 1)):
        with pytest.raises(UserError, match="another process serves it"):
            bind_unix(path, 0o600, "", 1)
        assert Path(path).is_socket()


def test_a_file_stays(path: str) -> None:
    Path(path).write_text("mine")
    with pytest.raises(UserError, match="it is no socket"):
        bind_unix(path, 0o600, "", 1)
    assert Path(path).read_text() == "mine"


def test_a_group_may_be_given(path: str) -> None:
    own = grp.getgrgid(os.getgid())
    with closing(bind_unix(path, 0o660, own.gr_name, 1)):
        assert os.stat(path).st_gid == own.gr_gid


@pytest.mark.parametrize(
    ("place", "group", "words"), [("", "no such group", "there is no group"), ("/no/dir", "", "no such file")]
)
def test_what_cannot_be_bound_leaves_nothing(path: str, place: str, group: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        bind_unix(path + place, 0o600, group, 1)
    assert not Path(path).exists()
