"""Real handshakes between our pyOpenSSL connections and Python's own TLS, in memory."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL

from proxy.address import Host
from proxy.ca import Authority
from proxy.problem import UserError
from proxy.rotation import load_authority
from proxy.tls import ClientTls, UpstreamTls, say_goodbye

HOST = Host("api.test")


class Peer:
    """Python's TLS on two memory buffers, client or server."""

    def __init__(self, context: ssl.SSLContext, name: str | None = None, session: ssl.SSLSession | None = None) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = name is None
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server, name, session)


def handshake(peer: Peer, ours: SSL.Connection) -> None:
    """Runs both sides to the end; raises what either raises."""
    steps: list[Callable[[], Any]] = [peer.tls.do_handshake, ours.do_handshake]
    for _ in range(20):
        for step in list(steps):
            try:
                step()
                steps.remove(step)
            except (ssl.SSLWantReadError, SSL.WantReadError):
                pass
            finally:
                _carry(peer, ours)
        if not steps:
            return
    raise AssertionError("the handshake does not end")


def _carry(peer: Peer, ours: SSL.Connection) -> None:
    if data := peer.outgoing.read():
        ours.bio_write(data)
    try:
        while data := ours.bio_read(65536):
            peer.incoming.write(data)
    except SSL.WantReadError:
        pass


# Towards clients


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return load_authority(tmp_path_factory.mktemp("certs"))


def client_context(authority: Authority, *protocols: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


@pytest.mark.parametrize("name", ["api.test", "xn--bcher-kva.test", "a_b.test", "10.0.0.1", "::1", "a" * 60 + ".test"])
def test_a_client_that_trusts_the_ca_accepts_the_certificate(name: str, authority: Authority) -> None:
    """With Python's defaults: VERIFY_X509_STRICT among them."""
    ours = ClientTls().connection(authority.leaf(Host.parse(name)))
    peer = Peer(client_context(authority), name)
    handshake(peer, ours)
    assert peer.tls.version() == "TLSv1.3"
    peer.tls.write(b"hello")
    _carry(peer, ours)
    assert ours.recv(100) == b"hello"


def test_it_is_a_certificate_for_that_host_alone(authority: Authority) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"other\.test"):
        handshake(Peer(client_context(authority), "other.test"), ClientTls().connection(authority.leaf(HOST)))


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ([], None),
        (["h2", "http/1.1"], "h2"),
        (["http/1.1", "h2"], "http/1.1"),
        (["http/1.1"], "http/1.1"),
        (["spdy/3", "http/1.1"], "http/1.1"),
        (["spdy/3"], None),
    ],
)
def test_the_client_has_its_choice_of_protocols(offered: list[str], chosen: str | None, authority: Authority) -> None:
    peer = Peer(client_context(authority, *offered), "api.test")
    handshake(peer, ClientTls().connection(authority.leaf(HOST)))
    assert peer.tls.selected_alpn_protocol() == chosen


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_an_old_version_is_refused(authority: Authority) -> None:
    context = client_context(authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((SSL.Error, ssl.SSLError)):
        handshake(Peer(context, "api.test"), ClientTls().connection(authority.leaf(HOST)))


def test_no_suite_without_forward_secrecy_is_taken(authority: Authority) -> None:
    context = client_context(authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    peer = Peer(context, "api.test")
    handshake(peer, ClientTls().connection(authority.leaf(HOST)))
    cipher = peer.tls.cipher()
    assert cipher
    assert cipher[0].startswith("ECDHE-")
    context.set_ciphers("AES128-GCM-SHA256:ECDHE-ECDSA-AES128-SHA")
    with pytest.raises((SSL.Error, ssl.SSLError)):
        handshake(Peer(context, "api.test"), ClientTls().connection(authority.leaf(HOST)))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_resumed(version: ssl.TLSVersion, authority: Authority) -> None:
    """The context is kept: another would not know the ticket."""
    client_tls, context = ClientTls(), client_context(authority)
    context.maximum_version = version
    first = Peer(context, "api.test")
    handshake(first, client_tls.connection(authority.leaf(HOST)))
    with pytest.raises(ssl.SSLWantReadError):
        first.tls.read()  # TLS 1.3 sends its tickets after the handshake
    second = Peer(context, "api.test", first.tls.session)
    handshake(second, client_tls.connection(authority.leaf(HOST)))
    assert second.tls.session_reused


def test_a_renewed_certificate_is_shown(tmp_path: Path) -> None:
    """At half its life of 24 hours."""
    real = datetime.datetime.now(datetime.UTC)
    now = [real - datetime.timedelta(hours=12)]
    authority = load_authority(tmp_path, lambda: now[0])
    client_tls = ClientTls()

    def serial() -> int:
        peer = Peer(client_context(authority), "api.test")
        handshake(peer, client_tls.connection(authority.leaf(HOST)))
        der = peer.tls.getpeercert(binary_form=True)
        assert der
        return x509.load_der_x509_certificate(der).serial_number

    first = serial()
    now[0] = real - datetime.timedelta(seconds=1)
    assert serial() == first
    now[0] = real
    assert serial() != first


def test_the_contexts_kept_are_the_last_used(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.tls.MAX_LEAVES", 2)
    client_tls = ClientTls()
    for name in ("a.test", "b.test", "a.test", "c.test"):
        client_tls.connection(authority.leaf(Host(name)))
    assert [*client_tls._contexts] == [authority.leaf(Host("a.test")), authority.leaf(Host("c.test"))]


# Towards upstreams


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def upstream_tls(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> UpstreamTls:
    path = tmp_path_factory.mktemp("trust") / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return UpstreamTls([path])


def server_context(certificate: trustme.LeafCert, *protocols: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


@pytest.mark.parametrize(
    ("names", "host"),
    [
        (["api.test"], "api.test"),
        (["other.test", "api.test"], "api.test"),
        (["*.api.test"], "a.api.test"),
        (["10.0.0.1"], "10.0.0.1"),
        (["2001:db8::1"], "2001:db8::1"),
    ],
)
def test_an_upstream_that_proves_the_name_is_accepted(
    names: list[str], host: str, ca: trustme.CA, upstream_tls: UpstreamTls
) -> None:
    ours = upstream_tls.connection(Host.parse(host), http2=False)
    handshake(Peer(server_context(ca.issue_cert(*names))), ours)
    assert ours.get_protocol_version_name() == "TLSv1.3"


@pytest.mark.parametrize(
    ("names", "host"),
    [
        (["other.test"], "api.test"),
        (["*.api.test"], "api.test"),
        (["*.api.test"], "b.a.api.test"),
        (["*.test"], "10.0.0.1"),
        (["10.0.0.2"], "10.0.0.1"),
        (["api.test"], "10.0.0.1"),
    ],
)
def test_an_upstream_that_proves_another_name_is_refused(
    names: list[str], host: str, ca: trustme.CA, upstream_tls: UpstreamTls
) -> None:
    with pytest.raises(SSL.Error, match="certificate verify failed"):
        handshake(Peer(server_context(ca.issue_cert(*names))), upstream_tls.connection(Host.parse(host), http2=False))


def test_a_name_in_the_subject_alone_proves_nothing(ca: trustme.CA, upstream_tls: UpstreamTls) -> None:
    """RFC 9525 section 2."""
    for certificate in (ca.issue_cert(common_name="api.test"), ca.issue_cert("a@b.test", common_name="api.test")):
        with pytest.raises(SSL.Error, match="certificate verify failed"):
            handshake(Peer(server_context(certificate)), upstream_tls.connection(HOST, http2=False))


def test_a_certificate_out_of_its_time_is_refused(ca: trustme.CA, upstream_tls: UpstreamTls) -> None:
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    for begins, ends in ((now - 2 * day, now - day), (now + day, now + 2 * day)):
        certificate = ca.issue_cert("api.test", not_before=begins, not_after=ends)
        with pytest.raises(SSL.Error, match="certificate verify failed"):
            handshake(Peer(server_context(certificate)), upstream_tls.connection(HOST, http2=False))


def test_a_certificate_of_a_ca_nobody_trusts_is_refused(ca: trustme.CA, upstream_tls: UpstreamTls) -> None:
    stranger = trustme.CA()
    with pytest.raises(SSL.Error, match="certificate verify failed"):
        handshake(Peer(server_context(stranger.issue_cert("api.test"))), upstream_tls.connection(HOST, http2=False))
    with pytest.raises(SSL.Error, match="certificate verify failed"):
        handshake(Peer(server_context(ca.issue_cert("api.test"))), UpstreamTls([]).connection(HOST, http2=False))


def odd_context(ca: trustme.CA, folder: Path, name: str, usage: x509.ObjectIdentifier) -> ssl.SSLContext:
    """A server with a certificate that no public CA would sign."""
    now, key = datetime.datetime.now(datetime.UTC), ec.generate_private_key(ec.SECP256R1())
    signer = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.load_pem_x509_certificate(ca.cert_pem.bytes()).subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "odd.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "odd.pem")
    return context


def test_a_certificate_for_clients_is_none_for_servers(
    ca: trustme.CA, upstream_tls: UpstreamTls, tmp_path: Path
) -> None:
    context = odd_context(ca, tmp_path, "api.test", ExtendedKeyUsageOID.SERVER_AUTH)
    handshake(Peer(context), upstream_tls.connection(HOST, http2=False))
    context = odd_context(ca, tmp_path, "api.test", ExtendedKeyUsageOID.CLIENT_AUTH)
    with pytest.raises(SSL.Error, match="certificate verify failed"):
        handshake(Peer(context), upstream_tls.connection(HOST, http2=False))


def test_a_wildcard_stands_for_a_whole_label(ca: trustme.CA, upstream_tls: UpstreamTls, tmp_path: Path) -> None:
    """RFC 9525 section 6.3."""
    context = odd_context(ca, tmp_path, "a*.api.test", ExtendedKeyUsageOID.SERVER_AUTH)
    with pytest.raises(SSL.Error, match="certificate verify failed"):
        handshake(Peer(context), upstream_tls.connection(Host("ab.api.test"), http2=False))


def test_the_name_asked_for_is_the_one_that_is_checked(ca: trustme.CA, upstream_tls: UpstreamTls) -> None:
    """RFC 6066 section 3: an address is never sent as a name."""
    asked: list[str | None] = []
    context = server_context(ca.issue_cert("api.test", "10.0.0.1"))
    context.sni_callback = lambda _, name, __: asked.append(name)
    for host in (HOST, Host.parse("10.0.0.1")):
        handshake(Peer(context), upstream_tls.connection(host, http2=False))
    assert asked == ["api.test", None]


@pytest.mark.parametrize(("http2", "chosen"), [(True, "h2"), (False, "http/1.1")])
def test_http2_is_offered_only_where_the_client_speaks_it(
    http2: bool, chosen: str, ca: trustme.CA, upstream_tls: UpstreamTls
) -> None:
    peer = Peer(server_context(ca.issue_cert("api.test"), "h2", "http/1.1"))
    handshake(peer, upstream_tls.connection(HOST, http2=http2))
    assert peer.tls.selected_alpn_protocol() == chosen


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_with_an_upstream_is_resumed(version: ssl.TLSVersion, ca: trustme.CA, tmp_path: Path) -> None:
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    upstream_tls, context = UpstreamTls([tmp_path / "ca.pem"]), server_context(ca.issue_cert("api.test"))
    context.maximum_version = version
    reused = []
    for _ in range(2):
        peer, ours = Peer(context), upstream_tls.connection(HOST, http2=False)
        handshake(peer, ours)
        peer.tls.write(b"x")
        _carry(peer, ours)
        assert ours.recv(1) == b"x"  # behind the tickets
        reused.append(peer.tls.session_reused)
    assert reused == [False, True]


def test_nothing_is_resumed_of_an_upstream_that_was_refused(ca: trustme.CA, tmp_path: Path) -> None:
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    upstream_tls, context = UpstreamTls([tmp_path / "ca.pem"]), server_context(ca.issue_cert("other.test"))
    for _ in range(2):
        peer = Peer(context)
        with pytest.raises(SSL.Error, match="certificate verify failed"):
            handshake(peer, upstream_tls.connection(HOST, http2=False))
        assert not peer.tls.session_reused


def test_a_trust_file_without_a_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.der").write_bytes(b"\x30\x82")
    with pytest.raises(UserError, match="holds no PEM certificate"):
        UpstreamTls([tmp_path / "ca.der"])


def test_the_end_is_told_to_the_peer(authority: Authority) -> None:
    """Else a cut connection and a whole answer look alike (RFC 8446 section 6.1)."""
    peer, ours = Peer(client_context(authority), "api.test"), ClientTls().connection(authority.leaf(HOST))
    handshake(peer, ours)
    with pytest.raises(ssl.SSLWantReadError):
        peer.tls.read()
    say_goodbye(ours)
    _carry(peer, ours)
    assert peer.tls.read() == b""
    say_goodbye(ClientTls().connection(authority.leaf(HOST)))
