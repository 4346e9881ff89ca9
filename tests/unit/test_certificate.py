"""Certificates are what strict clients accept; whom an older CA vouches for, they accept with the older root alone."""

from __future__ import annotations

import datetime
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from proxy.address import Host
from proxy.ca import Leaf
from proxy.certificate import cross_sign, key_pem, leaves_of, make_ca, make_leaf, may_sign_a_ca, new_key, pem
from proxy.tls import ClientTls
from tests.unit.test_tls import Peer, handshake

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
OLD_KEY, NEW_KEY, LEAF_KEY = new_key(), new_key(), new_key()
OLD = make_ca("old", OLD_KEY, NOW, below=1)
NEW = make_ca("new", NEW_KEY, NOW, below=1)
CROSS = cross_sign(NEW, OLD, OLD_KEY, NOW, NOW + DAY)


def accepts(root: x509.Certificate, leaf: Leaf, name: str) -> None:
    """A handshake of Python's TLS as strict as it can be; raises ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=pem(root).decode())
    handshake(Peer(context, name), ClientTls().connection(leaf))


def signed_by(issuer: x509.Certificate, key: object, name: str = "a.test") -> x509.Certificate:
    return make_leaf(Host.parse(name), leaves_of(LEAF_KEY, issuer), key, NOW)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.test", "10.0.0.1", "2001:db8::1"])
@pytest.mark.parametrize("root", [OLD, NEW], ids=["old", "new"])
def test_a_chain_leads_to_the_old_root_and_to_the_new_one(root: x509.Certificate, name: str) -> None:
    """In two verifiers that keep to RFC 5280, OpenSSL's and cryptography's."""
    leaf = Leaf(signed_by(NEW, NEW_KEY, name), LEAF_KEY, key_pem(LEAF_KEY), (CROSS,))
    accepts(root, leaf, name)
    host = Host.parse(name)
    subject = x509.IPAddress(host.ip) if host.ip else x509.DNSName(host.name)
    verifier = PolicyBuilder().store(Store([root])).time(NOW).build_server_verifier(subject)
    verifier.verify(leaf.certificate, [CROSS])


LONG = ".".join(["a" * 50] * 5)[:253]


@pytest.mark.parametrize("year", [1999, 2026, 2049, 2050, 2051])
@pytest.mark.parametrize("name", ["a.test", "a" * 63 + ".test", LONG, "xn--bcher-kva.test", "10.0.0.1", "2001:db8::1"])
def test_a_leaf_is_byte_for_byte_what_cryptography_would_make(name: str, year: int) -> None:
    """Where the CA's own name is of two parts too. The signature is another one each time."""
    now = datetime.datetime(year, 1, 1, 0, 30, 7, 89, datetime.UTC)
    attributes = (x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Ours"), x509.NameAttribute(NameOID.COMMON_NAME, "CA"))
    issuer_name = x509.Name(attributes)
    issuer = (
        x509.CertificateBuilder(issuer_name, issuer_name, NEW_KEY.public_key(), 1, NOW, NOW + DAY)
        .add_extension(x509.SubjectKeyIdentifier(b"id"), critical=False)
        .sign(NEW_KEY, hashes.SHA256())
    )
    host = Host.parse(name)
    made = make_leaf(host, leaves_of(LEAF_KEY, issuer), NEW_KEY, now)
    named = not host.ip and len(name) <= 64
    common_name = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if named else []
    alternative = x509.IPAddress(host.ip) if host.ip else x509.DNSName(name)
    usage = [False] * 8
    expected = (
        x509.CertificateBuilder(issuer_name, x509.Name(common_name), LEAF_KEY.public_key(), made.serial_number)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(LEAF_KEY.public_key()), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.KeyUsage(True, *usage), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier(b"id", None, None), critical=False)
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=not named)
        .sign(NEW_KEY, hashes.SHA256())
    )
    assert made.tbs_certificate_bytes == expected.tbs_certificate_bytes
    assert made.signature_algorithm_oid == expected.signature_algorithm_oid
    made.verify_directly_issued_by(issuer)


@pytest.mark.parametrize("number", [1, 0x7F, 0x80, 2**158 - 1, 2**159 - 1])
def test_a_serial_number_is_positive_and_as_short_as_it_can_be(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """X.690 section 8.3.2, RFC 5280 section 4.1.2.2."""
    monkeypatch.setattr(x509, "random_serial_number", lambda: number)
    assert signed_by(NEW, NEW_KEY).serial_number == number


def test_without_the_chain_the_old_root_does_not_do() -> None:
    with pytest.raises(ssl.SSLError, match="unable to get local issuer"):
        accepts(OLD, Leaf(signed_by(NEW, NEW_KEY), LEAF_KEY, key_pem(LEAF_KEY)), "a.test")


def test_a_ca_below_may_not_vouch_for_a_third() -> None:
    """The chain ends the old CA's word at its successor."""
    third_key = new_key()
    third = make_ca("third", third_key, NOW)
    under = cross_sign(third, NEW, NEW_KEY, NOW, NOW + DAY)
    verifier = PolicyBuilder().store(Store([OLD])).time(NOW).build_server_verifier(x509.DNSName("a.test"))
    with pytest.raises(VerificationError):
        verifier.verify(signed_by(third, third_key), [under, CROSS])


def test_key_identifiers_chain() -> None:
    """VERIFY_X509_STRICT asks for them, and where two CAs have one name they tell which signed."""

    def own(certificate: x509.Certificate) -> bytes:
        return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest

    def issuer(certificate: x509.Certificate) -> bytes | None:
        return certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier

    assert issuer(signed_by(NEW, NEW_KEY)) == own(NEW) == own(CROSS)
    assert issuer(CROSS) == own(OLD)


def test_only_a_ca_with_room_below_it_may_sign_another() -> None:
    assert may_sign_a_ca(OLD)
    assert not may_sign_a_ca(make_ca("leafs only", OLD_KEY, NOW))


def test_the_openssl_of_the_system_agrees(tmp_path: Path) -> None:
    """`openssl verify` with the old root alone."""
    files = {"root": pem(OLD), "chain": pem(CROSS), "leaf": pem(signed_by(NEW, NEW_KEY))}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = ["openssl", "verify", "-x509_strict", "-CAfile", "root", "-untrusted", "chain", "leaf"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=10, check=False)
    assert (result.returncode, result.stdout) == (0, "leaf: OK\n"), result.stderr
