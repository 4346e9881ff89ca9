"""TLS to the proxy itself: our certificate, and the client's."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proxy.address import Host
from proxy.ca import Authority, Leaf
from proxy.proof import Proof
from proxy.settingvalue import Listener
from proxy.tls import CIPHERS

HANDSHAKE = 10.0  # seconds
NAMES = 32  # names a listener shows certificates for: any client may ask for any
_NO_KEY = "/dev/null/key"
_TELL = 10.0  # seconds between two lines in the log about handshakes that failed
_log = logging.getLogger("sallyport")


class TlsDoor:
    """The server's side of TLS on listeners. `proof` tells what a client's certificate proves; without `clients_ca`
    none is asked for."""

    def __init__(
        self, authority: Authority, clients_ca: Path | None = None, proof: Callable[[bytes], Proof] | None = None
    ) -> None:
        self._authority = authority
        self._clients_ca = clients_ca
        self._proof = proof
        self._contexts: OrderedDict[tuple[Leaf, bool], ssl.SSLContext] = OrderedDict()
        self._names: dict[str, set[Host]] = {}
        self._told = -_TELL

    async def begin(self, listener: Listener, writer: asyncio.StreamWriter) -> tuple[Proof, ...]:
        """A handshake, and what it proves of the client. Raises OSError (ssl.SSLError), TimeoutError."""
        own = Host.parse(writer.get_extra_info("sockname")[0].partition("%")[0])
        await writer.start_tls(self._context(listener, own), ssl_handshake_timeout=HANDSHAKE)
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return (self._proof(certificate),) if certificate and self._proof else ()

    def _context(self, listener: Listener, host: Host) -> ssl.SSLContext:
        """The context that shows a certificate for `host`; cached, so that sessions resume."""
        leaf, required = self._authority.leaf(host), listener.client_certificate == "required"
        context = self._contexts.get((leaf, required))
        if context is None:
            context = self._contexts[leaf, required] = self._make(leaf, required)
            context.sni_callback = lambda connection, name, _: self._named(listener, connection, name)
            if len(self._contexts) > 4 * NAMES:
                self._contexts.popitem(last=False)
        return context

    def _make(self, leaf: Leaf, required: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        context.set_alpn_protocols(["http/1.1"])
        context.num_tickets = 1
        load_leaf(context, leaf)
        if self._clients_ca:
            context.load_verify_locations(self._clients_ca)
            context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        return context

    def _named(self, listener: Listener, connection: Any, name: str | None) -> None:
        """The client said by which name it knows us."""
        try:
            host = Host.parse(name or "")
        except ValueError:
            return
        names = self._names.setdefault(listener.address, set())
        if host in names or len(names) < NAMES:
            names.add(host)
            connection.context = self._context(listener, host)

    def failed(self, listener: Listener, error: Exception) -> None:
        """Say why a handshake failed, but not for each of many."""
        now = time.monotonic()
        if now >= self._told + _TELL:
            self._told = now
            why = getattr(error, "verify_message", "") or getattr(error, "reason", "") or type(error).__name__
            _log.warning("a TLS handshake on %s failed: %s", listener.address, why)


def load_leaf(context: ssl.SSLContext, leaf: Leaf, *, has_key: bool = False) -> None:
    """Have a context show a leaf. ssl loads a chain only from a file, so it gets one that is nowhere on a disk.

    The key takes 500 us of 800. A context that `has_key`, from another leaf, is given none, and keeps the one it has:
    OpenSSL reads the certificates first, and drops a key that does not belong to them.
    """
    memory = os.memfd_create("leaf", os.MFD_CLOEXEC)
    with open(memory, "wb", buffering=0) as file:
        path = f"/proc/self/fd/{memory}"
        if not has_key:
            file.write(leaf.pem)
            context.load_cert_chain(path)
            return
        file.write(leaf.certificates_pem)
        try:
            context.load_cert_chain(path, _NO_KEY)
        except NotADirectoryError:  # said of the key's file alone, and the certificates are loaded
            return
        raise ssl.SSLError("a certificate was loaded with a key from nowhere")
