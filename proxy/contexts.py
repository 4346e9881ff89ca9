"""TLS contexts of the standard library that show our leaves. mitmproxy's stack has its own, see `tls`."""

from __future__ import annotations

import ssl
from collections import OrderedDict

from proxy.ca import Leaf
from proxy.tls import CIPHERS
from proxy.tlsdoor import load_leaf

MAX_CONTEXTS = 256  # leaves that need not be read again


class Contexts:
    """A context for each of the leaves that were shown last. To make one, and to read a leaf into it, takes longer than
    two handshakes."""

    def __init__(self) -> None:
        self._contexts: OrderedDict[Leaf, ssl.SSLContext] = OrderedDict()

    def get(self, leaf: Leaf) -> ssl.SSLContext:
        """The context that shows `leaf`. Wrap a socket with it before the next call, when it may come to show another
        one; what has been wrapped keeps what it shows, because OpenSSL's SSL_new copies it."""
        context = self._contexts.get(leaf)
        if context is None:
            full = len(self._contexts) >= MAX_CONTEXTS
            context = self._contexts.popitem(last=False)[1] if full else _context()
            load_leaf(context, leaf)
            self._contexts[leaf] = context
        self._contexts.move_to_end(leaf)
        return context


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    context.num_tickets = 1
    return context
