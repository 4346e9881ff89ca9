"""TLS to the proxy itself, and client certificates as proofs."""

from __future__ import annotations

import datetime
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.harness import Connection, Proxy, Response, Upstream, refused, wait_for

RULES = """
version: 1
rules:
  - {name: tls, match: {host: api.test, method: [GET, POST], websocket: true}, action: allow}
  - {name: plain, match: {host: api.test, scheme: http}, action: allow}
"""
OPTIONAL, REQUIRED = 1, 2  # among the proxy's listeners
SPIFFE = "spiffe://example.org/agent/"

type Make = Callable[..., Proxy]


class Clients:
    """Agents' certificates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca, self.stranger = trustme.CA(), trustme.CA()
        self.ca.cert_pem.write_to_path(str(folder / "clients.pem"))

    def file(self, uri: str, seconds: float = 3600.0, ca: trustme.CA | None = None) -> str:
        """A certificate and its key for a SPIFFE ID."""
        signer = ca or self.ca
        issuer = x509.load_pem_x509_certificate(signer.cert_pem.bytes())
        ca_key = serialization.load_pem_private_key(signer.private_key_pem.bytes(), None)
        assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(seconds=seconds))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), True)
            .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CLIENT_AUTH]), False)
            .sign(ca_key, hashes.SHA256())
        )
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        path, pem = self.folder / f"{certificate.serial_number}.pem", serialization.Encoding.PEM
        path.write_bytes(key.private_bytes(pem, *form) + certificate.public_bytes(pem))
        return str(path)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return Clients(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def proxy(lane: str, make_proxy: Make, clients: Clients) -> Proxy:
    proxy = make_proxy(
        RULES,
        lane=lane,
        listen=["127.0.0.1:0", "tls://127.0.0.1:0", {"address": "tls://127.0.0.1:0", "client_certificate": "required"}],
        identity={"mtls": {"ca": str(clients.folder / "clients.pem"), "uri": SPIFFE + "{agent}"}},
    )
    for name in ("coder-1", "coder-2"):
        proxy.agent(name)
    return proxy


def context(proxy: Proxy, certificate: str | None = None) -> ssl.SSLContext:
    made = proxy.trust
    if certificate:
        made.load_cert_chain(certificate)
    return made


def arrive(
    proxy: Proxy, certificate: str | None = None, listener: int = OPTIONAL, name: str = "127.0.0.1"
) -> Connection:
    """A connection to the proxy by TLS."""
    connection = proxy.connect(listener)
    connection.start_tls(context(proxy, certificate), name)
    return connection


def ask(connection: Connection, path: str, headers: str = "") -> Response:
    connection.send(f"GET http://api.test{path} HTTP/1.1\r\nHost: api.test\r\n{headers}\r\n".encode())
    return connection.response()


class Inner(Connection):
    """TLS within TLS: what a client does in a tunnel through a TLS proxy."""

    def __init__(self, outer: Connection, trust: ssl.SSLContext, name: str) -> None:
        super().__init__(outer.sock)
        self.outer = outer
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = trust.wrap_bio(self._in, self._out, server_hostname=name)
        self._until(self._tls.do_handshake)

    def _until[T](self, step: Callable[[], T]) -> T:
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:
                self._flush()
                self._in.write(self.outer.recv())
            else:
                self._flush()
                return done

    def _flush(self) -> None:
        if data := self._out.read():
            self.outer.send(data)

    def send(self, data: bytes) -> None:
        self._until(lambda: self._tls.write(data))

    def recv(self) -> bytes:
        return self._until(lambda: self._tls.read(65536))


def tunnel(proxy: Proxy, connection: Connection, headers: str = "") -> Inner:
    connection.send(f"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n{headers}\r\n".encode())
    assert connection.response("CONNECT").status == 200
    return Inner(connection, proxy.trust, "api.test")


def test_a_certificate_names_its_agent(proxy: Proxy, clients: Clients, plain_upstream: Upstream) -> None:
    """By its SPIFFE ID; the audit line and the metric say by what."""
    connection = arrive(proxy, clients.file(SPIFFE + "coder-1"))
    for _ in range(2):
        assert ask(connection, "/cert").status == 200
    lines = proxy.audit(2, path="/cert")
    assert {(line["agent"], str(line["identity"])) for line in lines} == {("coder-1", "['mtls']")}
    assert lines[0]["client"].startswith("127.0.0.1:")
    assert 'sallyport_identity_proofs_total{proof="mtls"}' in proxy.fetch_admin("/metrics")[1]
    assert len(plain_upstream.seen) == 2


@pytest.mark.parametrize("listener", [OPTIONAL, REQUIRED])
def test_a_tunnel_within_tls(proxy: Proxy, clients: Clients, upstream: Upstream, listener: int) -> None:
    """Large bodies and several requests come through both layers whole."""
    inner = tunnel(proxy, arrive(proxy, clients.file(SPIFFE + "coder-1"), listener))
    body = b"x" * 300_000
    for number in range(2):
        head = f"POST /inner/{number} HTTP/1.1\r\nHost: api.test\r\nContent-Length: {len(body)}\r\n\r\n"
        inner.send(head.encode() + body)
        assert inner.response().status == 200
    assert [seen.body == body for seen in upstream.seen] == [True, True]
    assert {line["agent"] for line in proxy.audit(path="/inner/1")} == {"coder-1"}


def test_a_websocket_and_old_http_within_tls(
    proxy: Proxy, clients: Clients, upstream: Upstream, plain_upstream: Upstream
) -> None:
    """What the fast lane hands over."""
    file = clients.file(SPIFFE + "coder-1")
    inner = tunnel(proxy, arrive(proxy, file))
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"
    inner.send(f"GET /ws HTTP/1.1\r\nHost: api.test\r\n{upgrade}\r\n".encode())
    assert inner.response().status == 200  # the upstream does not upgrade
    old = arrive(proxy, file)
    old.send(b"GET http://api.test/old HTTP/1.0\r\nHost: api.test\r\n\r\n")
    assert old.response().status == 200
    assert {proxy.audit(path=path)[0]["agent"] for path in ("/ws", "/old")} == {"coder-1"}


def test_without_a_certificate_another_proof_will_do(proxy: Proxy, plain_upstream: Upstream) -> None:
    """Where it is optional; without any there is the usual challenge."""
    refused(ask(arrive(proxy), "/x"), "no_identity")
    assert ask(arrive(proxy), "/token", proxy.auth("coder-2")).status == 200
    assert proxy.audit(path="/token")[0]["identity"] == ["token"]


@pytest.mark.parametrize("uri", [SPIFFE + "nobody", "spiffe://evil.org/agent/coder-1", SPIFFE + "coder-1/x"])
def test_a_certificate_that_names_no_agent_is_a_bad_proof(
    proxy: Proxy, clients: Clients, plain_upstream: Upstream, uri: str
) -> None:
    """Even beside a good token: it was shown."""
    refused(ask(arrive(proxy, clients.file(uri)), "/x", proxy.auth("coder-1")), "bad_identity")
    assert plain_upstream.seen == []


def test_a_certificate_and_a_token_of_two_agents_conflict(
    proxy: Proxy, clients: Clients, plain_upstream: Upstream
) -> None:
    file = clients.file(SPIFFE + "coder-1")
    refused(ask(arrive(proxy, file), "/x", proxy.auth("coder-2")), "identity_conflict")
    assert ask(arrive(proxy, file), "/both", proxy.auth("coder-1")).status == 200
    assert proxy.audit(path="/both")[0]["identity"] == ["token", "mtls"]
    assert len(plain_upstream.seen) == 1


@pytest.mark.parametrize("kind", ["none", "expired", "of another CA"])
def test_a_handshake_that_must_fail_fails(proxy: Proxy, clients: Clients, plain_upstream: Upstream, kind: str) -> None:
    """TLS 1.3 tells the client only when it reads."""
    file = {
        "none": lambda: None,
        "expired": lambda: clients.file(SPIFFE + "coder-1", -60.0),
        "of another CA": lambda: clients.file(SPIFFE + "coder-1", ca=clients.stranger),
    }[kind]()
    with pytest.raises(OSError, match=r"closed after|alert|EOF|reset|Broken pipe"):
        ask(arrive(proxy, file, REQUIRED), "/x", proxy.auth("coder-1"))
    assert plain_upstream.seen == []


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2])
def test_a_session_resumes_and_still_names_its_agent(
    proxy: Proxy, clients: Clients, plain_upstream: Upstream, version: ssl.TLSVersion
) -> None:
    """A resumed handshake shows no certificate; the session remembers it."""
    trust = context(proxy, clients.file(SPIFFE + "coder-2"))
    trust.maximum_version = version
    first = proxy.connect(REQUIRED)
    first.start_tls(trust, "127.0.0.1")
    assert ask(first, "/first").status == 200
    again = resumed(proxy, trust, first)
    assert ask(again, f"/resumed/{version.name}").status == 200
    (line,) = proxy.audit(path=f"/resumed/{version.name}")
    assert (line["agent"], line["identity"]) == ("coder-2", ["mtls"])


def resumed(proxy: Proxy, trust: ssl.SSLContext, first: Connection) -> Connection:
    assert isinstance(first.sock, ssl.SSLSocket)
    again = proxy.connect(REQUIRED)
    again.sock = sock = trust.wrap_socket(again.sock, server_hostname="127.0.0.1", session=first.sock.session)
    assert sock.session_reused
    return again


def test_a_certificate_ends_on_a_connection_that_stands(
    proxy: Proxy, clients: Clients, plain_upstream: Upstream
) -> None:
    """And in a resumed session, which TLS does not verify again."""
    trust = context(proxy, clients.file(SPIFFE + "coder-1", 3.0))
    connection = proxy.connect(REQUIRED)
    connection.start_tls(trust, "127.0.0.1")
    assert ask(connection, "/early").status == 200
    late = wait_for(lambda: answer if (answer := ask(connection, "/late")).status != 200 else None)
    refused(late, "bad_identity")
    refused(ask(resumed(proxy, trust, connection), "/again"), "bad_identity")


def test_the_proxy_shows_a_certificate_for_the_name_it_is_called(proxy: Proxy, plain_upstream: Upstream) -> None:
    """By its address, or by the name that clients have for it."""
    for name in ("127.0.0.1", "egress.example.test"):
        assert ask(arrive(proxy, name=name), "/named", proxy.auth("coder-1")).status == 200


def test_plain_http_to_a_tls_listener_ends(proxy: Proxy, plain_upstream: Upstream) -> None:
    connection = proxy.connect(OPTIONAL)
    connection.send(f"GET http://api.test/x HTTP/1.1\r\nHost: api.test\r\n{proxy.auth('coder-1')}\r\n".encode())
    while connection.recv():
        pass
    assert plain_upstream.seen == []


def test_many_clients_at_once(proxy: Proxy, clients: Clients, upstream: Upstream) -> None:
    """Each by a tunnel of its own."""
    file = clients.file(SPIFFE + "coder-1")
    statuses: list[int] = []

    def one() -> None:
        inner = tunnel(proxy, arrive(proxy, file))
        inner.send(b"GET /many HTTP/1.1\r\nHost: api.test\r\n\r\n")
        statuses.append(inner.response().status)

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 12
