"""Unix sockets to listen on: bound without a moment in which others could use them, and who is at their other end."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
import stat
import struct

from proxy.problem import UserError

_DRAFT = ".new"
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid (unix(7))


def bind_unix(path: str, mode: int, group: str, backlog: int) -> socket.socket:
    """A socket that listens at `path`; one that nobody serves any more is replaced.

    Raises UserError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(path)
        if group:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        os.chmod(path, mode)
        sock.listen(backlog)  # last: until now nobody could connect
    except KeyError:
        _give_up(sock, path)
        raise UserError(f"listen unix:{path}: there is no group {group}") from None
    except OSError as error:
        _give_up(sock, path)
        why = (error.strerror or "cannot be bound").lower()
        raise UserError(f"listen unix:{path}: {why}; give a folder that is there and ours to write") from None
    except UserError:
        sock.close()
        raise
    return sock


def take_unix(path: str, mode: int, group: str, backlog: int) -> socket.socket:
    """As `bind_unix`, and in the place of one that is served: who connects from now on comes here.

    Raises UserError.
    """
    draft = path + _DRAFT
    remove(draft)
    sock = bind_unix(draft, mode, group, backlog)
    os.rename(draft, path)
    return sock


def _give_up(sock: socket.socket, path: str) -> None:
    bound = sock.getsockname() == path
    sock.close()
    if bound:
        remove(path)


def _remove_stale(path: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UserError(f"listen unix:{path}: there is a file of that name, and it is no socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            remove(path)
        except OSError as error:
            raise UserError(f"listen unix:{path}: {(error.strerror or 'in use').lower()}; remove it") from None
        else:
            raise UserError(f"listen unix:{path}: another process serves it; stop that, or set listen: to another")


def remove(path: str) -> None:
    """Take the name away; it may be gone already."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as they were when it connected: the kernel says so, nobody can forge it."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid
