"""Where a connection that the firewall redirected to us was going (nft `redirect`, iptables REDIRECT)."""

from __future__ import annotations

import socket
import struct

_ORIGINAL_DST = 80  # SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST, linux/netfilter_ipv4.h and netfilter_ipv6/ip6_tables.h
_IPV4 = struct.Struct("!2xH4s8x")  # struct sockaddr_in
_IPV6 = struct.Struct("!2xH4x16s4x")  # struct sockaddr_in6


def original_port(sock: socket.socket) -> int:
    """The port a redirected client dialled; 0 for one that was not redirected, but came to our own address.

    The address is left alone: a name in the request says where to go, and it is resolved here.
    """
    if sock.family == socket.AF_INET6:
        level, form, family = socket.IPPROTO_IPV6, _IPV6, socket.AF_INET6
    else:
        level, form, family = socket.IPPROTO_IP, _IPV4, socket.AF_INET
    try:
        port, packed = form.unpack(sock.getsockopt(level, _ORIGINAL_DST, form.size))
    except OSError:  # no entry of connection tracking: nothing was redirected
        return 0
    own = sock.getsockname()[:2]
    return 0 if (socket.inet_ntop(family, packed), port) == own else int(port)
