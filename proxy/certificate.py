"""X.509 certificates as this proxy makes them (RFC 5280): a CA, a CA signed by another one, a leaf. Opens no file."""

from __future__ import annotations

import datetime
from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proxy.address import Host

CA_LIFETIME = datetime.timedelta(days=3650)
LEAF_LIFETIME = datetime.timedelta(hours=24)
BACKDATED = datetime.timedelta(hours=1)  # for sandboxes whose clock is behind
MAX_COMMON_NAME = 64  # RFC 5280 appendix A.1

type PrivateKey = ec.EllipticCurvePrivateKey
type Clock = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    """The time certificates are dated by."""
    return datetime.datetime.now(datetime.UTC)


def new_key() -> PrivateKey:
    """An ECDSA key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """The key in PKCS #8, not encrypted."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def pem(*certificates: x509.Certificate) -> bytes:
    """Certificates one after the other."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def make_ca(
    name: str,
    key: PrivateKey,
    now: datetime.datetime,
    *,
    below: int = 0,
    until: datetime.datetime | None = None,
    constraints: x509.NameConstraints | None = None,
) -> x509.Certificate:
    """A CA that signed itself, with at most `below` CAs under it; `constraints` are what it may vouch for."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:MAX_COMMON_NAME])])
    builder = _ca(subject, subject, key, now, until or now + CA_LIFETIME, below)
    if constraints:
        builder = builder.add_extension(constraints, critical=True)  # RFC 5280 section 4.2.1.10
    return builder.sign(key, hashes.SHA256())


def cross_sign(
    new: x509.Certificate, old: x509.Certificate, old_key: PrivateKey, now: datetime.datetime, until: datetime.datetime
) -> x509.Certificate:
    """The CA `new` vouched for by `old`, so that who trusts only the old one finds a path."""
    key = new.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return (
        _ca(new.subject, old.subject, key, now, until, 0)
        .add_extension(_issued_by(old), critical=False)
        .sign(old_key, hashes.SHA256())
    )


def may_sign_a_ca(certificate: x509.Certificate) -> bool:
    """Whether a CA may have another one below it (RFC 5280 section 4.2.1.9)."""
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    return constraints.path_length is None or constraints.path_length > 0


def leaves_of(key: PrivateKey, issuer: x509.Certificate) -> x509.CertificateBuilder:
    """What is the same in all certificates for `key` that `issuer` signs."""
    return (
        _certificate(issuer.subject, key.public_key())
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_issued_by(issuer), critical=False)
    )


def make_leaf(
    host: Host, leaves: x509.CertificateBuilder, issuer_key: PrivateKey, now: datetime.datetime
) -> x509.Certificate:
    """A server's certificate for `host`, valid for a day; `leaves` is what the issuer's are made from."""
    name: x509.GeneralName = x509.IPAddress(host.ip) if host.ip else x509.DNSName(host.name)
    # An address as common name would be held against the DNS names its CA is limited to (RFC 6125 section 6.4.4).
    named = host.ip is None and len(host.name) <= MAX_COMMON_NAME
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host.name)] if named else [])
    return (
        _dated(leaves.subject_name(subject), now, now + LEAF_LIFETIME)
        # RFC 5280 section 4.2.1.6: without a subject the alternative name is critical.
        .add_extension(x509.SubjectAlternativeName([name]), critical=not named)
        .sign(issuer_key, hashes.SHA256())
    )


def _ca(
    subject: x509.Name,
    issuer: x509.Name,
    key: PrivateKey | ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    until: datetime.datetime,
    below: int,
) -> x509.CertificateBuilder:
    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    return (
        _dated(_certificate(issuer, public).subject_name(subject), now, until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=below), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )


def _certificate(issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .public_key(key)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _dated(
    builder: x509.CertificateBuilder, now: datetime.datetime, until: datetime.datetime
) -> x509.CertificateBuilder:
    """Valid from now on, with a serial number of its own."""
    return builder.serial_number(x509.random_serial_number()).not_valid_before(now - BACKDATED).not_valid_after(until)


def _issued_by(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
