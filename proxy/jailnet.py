"""The network of a jail: a namespace with nothing but a loopback device, and the proxy's listeners in it.

A listening socket stays in the namespace it was made in, whoever accepts from it. So the proxy, outside, gets these
and needs no relay; who connects to them is in this jail, and cannot pretend otherwise.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from proxy.jaildns import GATEWAY
from proxy.problem import UserError

PROXY_PORT = 8080
WEB_PORTS = (80, 443)  # where clients come that ignore the variables
QUEUE = 1024
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C  # linux/sockios.h
_UP_AND_RUNNING = 0x41  # IFF_UP | IFF_RUNNING, linux/if.h
_FLAGS = struct.Struct("16sH14x")  # struct ifreq with flags
_ADDRESS = struct.Struct("16sHxx4s8x8x")  # struct ifreq with a struct sockaddr_in


def enter_namespace() -> None:
    """Leave the host's network, for a user and a network namespace of our own in which we are the same user.

    Raises UserError where the kernel does not allow it.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        _loopback()
    except OSError as error:
        why = (error.strerror or "refused").lower()
        raise UserError(
            f"the kernel allows this user no namespaces ({why}): an administrator can allow them with "
            "`sysctl -w user.max_user_namespaces=10000 kernel.apparmor_restrict_unprivileged_userns=0`"
        ) from None


def _loopback() -> None:
    """Brings it up, and gives it all of 198.18.0.0/15: on this device every address of a prefix is the host's own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, _FLAGS.pack(b"lo", _UP_AND_RUNNING))
        for call, address in ((_SIOCSIFADDR, GATEWAY), (_SIOCSIFNETMASK, "255.254.0.0")):
            packed = _ADDRESS.pack(b"lo:1", socket.AF_INET, socket.inet_aton(address))
            fcntl.ioctl(control, call, packed)


def listeners() -> list[socket.socket]:
    """For DNS, for clients that know of the proxy, and for those that do not; made where we are now."""
    dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    dns.bind((GATEWAY, 53))
    return [dns, *(_listener(*place) for place in ((GATEWAY, PROXY_PORT), *(("0.0.0.0", port) for port in WEB_PORTS)))]  # noqa: S104  # every address of the jail


def _listener(host: str, port: int) -> socket.socket:
    sock = socket.create_server((host, port), backlog=QUEUE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
