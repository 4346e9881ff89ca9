"""X.509 certificates as this proxy makes them (RFC 5280): a CA, a CA signed by another one, a leaf. Opens no file."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proxy.address import Host

CA_LIFETIME = datetime.timedelta(days=3650)
LEAF_LIFETIME = datetime.timedelta(hours=24)
BACKDATED = datetime.timedelta(hours=1)  # for sandboxes whose clock is behind
MAX_COMMON_NAME = 64  # RFC 5280 appendix A.1

_INTEGER, _BIT_STRING, _OCTET_STRING, _OBJECT_IDENTIFIER, _UTF8 = 0x02, 0x03, 0x04, 0x06, 0x0C  # tags of X.680
_UTC_TIME, _GENERALIZED_TIME, _SEQUENCE, _SET = 0x17, 0x18, 0x30, 0x31
_DNS_NAME, _IP_ADDRESS, _EXTENSIONS = 0x82, 0x87, 0xA3  # RFC 5280 sections 4.2.1.6 and 4.1
_ALTERNATIVE_NAME = 17
_VERSION_3, _TRUE = bytes.fromhex("a003020102"), bytes.fromhex("0101ff")
_COMMON_NAME = bytes.fromhex("0603550403")
_ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")  # RFC 5758 section 3.2
_DIGITS = str.maketrans("", "", "-T:")
_SIGNATURE = ec.ECDSA(hashes.SHA256())

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


@dataclass(frozen=True, slots=True)
class Leaves:
    """What is the same in all certificates for a key that an issuer signs, in DER."""

    issuer: bytes
    key: bytes
    extensions: bytes


def leaves_of(key: PrivateKey, issuer: x509.Certificate) -> Leaves:
    """What leaves for `key` have in common that `issuer` signs."""
    public = key.public_key()
    extensions = (
        _extension(x509.SubjectKeyIdentifier.from_public_key(public)),
        _extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
        _extension(_key_usage(digital_signature=True), critical=True),
        _extension(x509.BasicConstraints(ca=False, path_length=None), critical=True),
        _extension(_issued_by(issuer)),
    )
    spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return Leaves(issuer.subject.public_bytes(), spki, b"".join(extensions))


def make_leaf(host: Host, leaves: Leaves, issuer_key: PrivateKey, now: datetime.datetime) -> x509.Certificate:
    """A server's certificate for `host`, valid for a day; `leaves` is what the issuer's are made from. Put together
    here: a CertificateBuilder takes three times as long as the signature."""
    name = host.name.encode("ascii")
    # An address as common name would be held against the DNS names its CA is limited to (RFC 6125 section 6.4.4).
    named = host.ip is None and len(name) <= MAX_COMMON_NAME
    subject = _der(_SET, _der(_SEQUENCE, _COMMON_NAME, _der(_UTF8, name))) if named else b""
    names = _der(_SEQUENCE, _der(_IP_ADDRESS, host.ip.packed) if host.ip else _der(_DNS_NAME, name))
    # RFC 5280 section 4.2.1.6: without a subject they are critical.
    extensions = leaves.extensions + _extension_of(_ALTERNATIVE_NAME, names, critical=not named)
    serial = x509.random_serial_number()
    signed = _der(
        _SEQUENCE,
        _VERSION_3,
        _der(_INTEGER, serial.to_bytes(serial.bit_length() // 8 + 1)),
        _ECDSA_SHA256,
        leaves.issuer,
        _der(_SEQUENCE, _time(now - BACKDATED), _time(now + LEAF_LIFETIME)),
        _der(_SEQUENCE, subject),
        leaves.key,
        _der(_EXTENSIONS, _der(_SEQUENCE, extensions)),
    )
    signature = _der(_BIT_STRING, b"\0", issuer_key.sign(signed, _SIGNATURE))
    return x509.load_der_x509_certificate(_der(_SEQUENCE, signed, _ECDSA_SHA256, signature))


def _der(tag: int, *parts: bytes) -> bytes:
    """A value of X.690 section 8.1, its length in the one form that DER allows (section 10.1)."""
    content = b"".join(parts)
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes((tag, 0x80 | len(length))) + length + content


def _time(moment: datetime.datetime) -> bytes:
    """Two digits of the year until 2049, then four (RFC 5280 section 4.1.2.5)."""
    digits = moment.astimezone(datetime.UTC).isoformat()[:19].translate(_DIGITS)  # strftime costs five times as much
    tag, form = (_UTC_TIME, digits[2:]) if digits < "2050" else (_GENERALIZED_TIME, digits)
    return _der(tag, form.encode(), b"Z")


def _extension(value: x509.ExtensionType, *, critical: bool = False) -> bytes:
    """One of RFC 5280 section 4.2.1, whose identifiers are 2.5.29 and a number."""
    prefix, _, number = value.oid.dotted_string.rpartition(".")
    assert prefix == "2.5.29"
    return _extension_of(int(number), value.public_bytes(), critical=critical)


def _extension_of(number: int, value: bytes, *, critical: bool) -> bytes:
    identifier = _der(_OBJECT_IDENTIFIER, bytes((0x55, 0x1D, number)))
    return _der(_SEQUENCE, identifier, _TRUE if critical else b"", _der(_OCTET_STRING, value))


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
