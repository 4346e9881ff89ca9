"""TLS contexts of the standard library that show our leaves. mitmproxy's stack has its own, see `tls`."""

from __future__ import annotations

import ssl
from collections import OrderedDict

from proxy.ca import Leaf
from proxy.tls import CIPHERS
from proxy.tlsdoor import load_leaf

MAX_CONTEXTS = 256  # leaves that need not be read again
MAX_ONCE = 32  # and leaves that were shown once, which make room for each other


class Contexts:
    """A context for each of the leaves that were shown last. To make one, and to read a leaf into it, takes longer than
    two handshakes; to read a leaf of the same key into one that is there, less than one. Ever new hosts share a few
    contexts, and take none from those that are asked for again."""

    def __init__(self) -> None:
        self._once: OrderedDict[Leaf, ssl.SSLContext] = OrderedDict()
        self._again: OrderedDict[Leaf, ssl.SSLContext] = OrderedDict()

    def get(self, leaf: Leaf) -> ssl.SSLContext:
        """The context that shows `leaf`. Wrap a socket with it before the next call, when it may come to show another
        one; what has been wrapped keeps what it shows, because OpenSSL's SSL_new copies it."""
        context = self._again.get(leaf)
        if context:
            self._again.move_to_end(leaf)
        elif context := self._once.pop(leaf, None):
            self._again[leaf] = context
            if len(self._again) > MAX_CONTEXTS:
                last, unused = self._again.popitem(last=False)
                self._once[last] = unused
                self._once.move_to_end(last, last=False)  # the next to make room
        else:
            full = len(self._once) >= MAX_ONCE
            before, context = self._once.popitem(last=False) if full else (None, _context())
            load_leaf(context, leaf, has_key=before is not None and before.key is leaf.key)
            self._once[leaf] = context
        return context


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # writing would have to wait for reading
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    context.num_tickets = 1
    return context
