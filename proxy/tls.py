"""TLS towards clients with our leaves, and towards upstreams with the public roots. pyOpenSSL lives only here."""

from __future__ import annotations

import contextlib
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import certifi
from mitmproxy.net import tls as net_tls
from mitmproxy.proxy.layers.tls import HTTP1_ALPNS, HTTP_ALPNS
from OpenSSL import SSL

from proxy.address import Host
from proxy.ca import MAX_LEAVES, Leaf
from proxy.problem import UserError

CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)  # forward secret AEAD suites only (RFC 9325 section 4.2)
MAX_SESSIONS, EARLIER = 64, 4  # hosts whose sessions are kept, and of how many connections
_HOSTFLAGS = SSL._lib.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS | SSL._lib.X509_CHECK_FLAG_NEVER_CHECK_SUBJECT  # type: ignore[attr-defined]


class ClientTls:
    """Server-side TLS: a cached context for each leaf, so that sessions resume and a handshake costs little."""

    def __init__(self) -> None:
        self._contexts: OrderedDict[Leaf, SSL.Context] = OrderedDict()

    def connection(self, leaf: Leaf) -> SSL.Connection:
        """A connection that shows `leaf`."""
        context = self._contexts.get(leaf)
        if context is None:
            context = self._contexts[leaf] = self._context(leaf)
            if len(self._contexts) > MAX_LEAVES:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(leaf)
        connection = SSL.Connection(context)
        connection.set_accept_state()
        return connection

    @staticmethod
    def _context(leaf: Leaf) -> SSL.Context:
        context = _context(SSL.TLS_SERVER_METHOD)
        context.use_certificate(leaf.certificate)
        context.use_privatekey(leaf.key)
        for certificate in leaf.chain:
            context.add_extra_chain_cert(certificate)
        context.set_alpn_select_callback(_select_alpn)
        return context


class UpstreamTls:
    """Client-side TLS: chains up to the public roots or the operator's own, and the name dialled for.

    Raises UserError for a file in `trust` without a certificate.
    """

    def __init__(self, trust: Sequence[Path]) -> None:
        self._earlier: OrderedDict[Host, tuple[SSL.Connection, ...]] = OrderedDict()
        self._context = _context(SSL.TLS_CLIENT_METHOD)
        self._context.set_verify(SSL.VERIFY_PEER)
        with tempfile.NamedTemporaryFile() as roots:  # OpenSSL reads several CAs only from a file
            for path in (Path(certifi.where()), *trust):
                content = path.read_bytes()
                if b"-----BEGIN CERTIFICATE-----" not in content:  # OpenSSL would pass over it
                    raise UserError(f"{path} holds no PEM certificate; give upstream.trust the CA's certificate as PEM")
                roots.write(content + b"\n")
            roots.flush()
            self._context.load_verify_locations(roots.name)

    def connection(self, host: Host, *, http2: bool) -> SSL.Connection:
        """A connection that is established only with a certificate for `host` (RFC 9525)."""
        connection = SSL.Connection(self._context)
        parameters = SSL._lib.SSL_get0_param(connection._ssl)  # type: ignore[attr-defined]
        SSL._lib.X509_VERIFY_PARAM_set_hostflags(parameters, _HOSTFLAGS)  # type: ignore[attr-defined]
        if host.ip:
            packed = host.ip.packed
            done = SSL._lib.X509_VERIFY_PARAM_set1_ip(parameters, packed, len(packed))  # type: ignore[attr-defined]
        else:
            name = host.name.encode()
            connection.set_tlsext_host_name(name)
            done = SSL._lib.X509_VERIFY_PARAM_set1_host(parameters, name, len(name))  # type: ignore[attr-defined]
        if done != 1:
            raise ValueError("OpenSSL does not take the host name")
        connection.set_alpn_protos([b"h2", b"http/1.1"] if http2 else [b"http/1.1"])
        connection.set_connect_state()
        self._resume(host, connection)
        return connection

    def _resume(self, host: Host, connection: SSL.Connection) -> None:
        """Go on with the session of an earlier connection to `host`. Its tickets came behind its handshake, so that it
        is asked only now (RFC 8446 section 4.6.1); freed without a close_notify, its session would be bad to OpenSSL,
        so that some are kept."""
        earlier = self._earlier.pop(host, ())
        for last in reversed(earlier):
            if last.get_finished() and (session := last.get_session()):
                connection.set_session(session)
                break
        self._earlier[host] = (*earlier[1 - EARLIER :], connection)
        if len(self._earlier) > MAX_SESSIONS:
            self._earlier.popitem(last=False)


def say_goodbye(connection: SSL.Connection) -> None:
    """Queue a close_notify."""
    with contextlib.suppress(SSL.Error):
        connection.shutdown()


def _context(method: int) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_options(net_tls.DEFAULT_OPTIONS)
    context.set_cipher_list(CIPHERS.encode())
    return context


def _select_alpn(connection: SSL.Connection, offered: list[bytes]) -> Any:
    known = HTTP_ALPNS if b"h2" in offered else HTTP1_ALPNS
    return next((protocol for protocol in offered if protocol in known), SSL.NO_OVERLAPPING_PROTOCOLS)
