"""The certificate authority sandboxes trust: made on the first run, and the leaf certificates it signs."""

from __future__ import annotations

import datetime
import os
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proxy.address import Host
from proxy.problem import UserError

CA_LIFETIME = datetime.timedelta(days=3650)
LEAF_LIFETIME = datetime.timedelta(hours=24)
BACKDATED = datetime.timedelta(hours=1)  # for sandboxes whose clock is behind
MAX_LEAVES = 1000
MAX_COMMON_NAME = 64  # RFC 5280 appendix A.1

type PrivateKey = ec.EllipticCurvePrivateKey
type Clock = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    """The time certificates are dated by."""
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Leaf:
    """A certificate for one host and the key all leaves share."""

    certificate: x509.Certificate
    key: PrivateKey

    @cached_property
    def pem(self) -> bytes:
        """Key and certificate, as the standard library's ssl loads them."""
        return _key_pem(self.key) + self.certificate.public_bytes(serialization.Encoding.PEM)

    @cached_property
    def renew(self) -> datetime.datetime:
        """When a new one is minted: after half its life."""
        return self.certificate.not_valid_after_utc - LEAF_LIFETIME / 2


class Authority:
    """A CA and its bounded cache of leaves."""

    def __init__(self, certificate: x509.Certificate, key: PrivateKey, clock: Clock = utc_now) -> None:
        self.certificate = certificate
        self.on_mint: Callable[[], None] = lambda: None
        self._key = key
        self._clock = clock
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._leaves: OrderedDict[Host, Leaf] = OrderedDict()

    @property
    def pem(self) -> bytes:
        """The CA certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def leaf(self, host: Host) -> Leaf:
        """The certificate to show for `host`."""
        leaf = self._leaves.get(host)
        if leaf is None or self._clock() >= leaf.renew:
            leaf = self._leaves[host] = self._mint(host)
            self.on_mint()
            if len(self._leaves) > MAX_LEAVES:
                self._leaves.popitem(last=False)
        self._leaves.move_to_end(host)
        return leaf

    def _mint(self, host: Host) -> Leaf:
        name: x509.GeneralName = x509.IPAddress(host.ip) if host.ip else x509.DNSName(host.name)
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, host.name)] if len(host.name) <= MAX_COMMON_NAME else []
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        certificate = (
            _builder(x509.Name(subject), self.certificate.subject, self._leaf_key, LEAF_LIFETIME, self._clock())
            # RFC 5280 section 4.2.1.6: without a subject the alternative name is critical.
            .add_extension(x509.SubjectAlternativeName([name]), critical=not subject)
            .add_extension(usage, critical=False)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                    self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
                ),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return Leaf(certificate, self._leaf_key)


def load_authority(folder: Path, clock: Clock = utc_now) -> Authority:
    """The CA in `folder` (`ca.pem`, `ca.key`), made there if neither file exists.

    Raises UserError.
    """
    certificate_file, key_file = folder / "ca.pem", folder / "ca.key"
    try:
        if not certificate_file.exists() and not key_file.exists():
            _create(folder, certificate_file, key_file, clock())
        _check_private(key_file)
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and folder.is_dir():
            raise UserError(
                f"{error.filename} is missing; restore it, or remove the other one too to start anew"
            ) from None
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; point certs: at a folder that belongs to you"
        ) from None
    except TypeError:  # cryptography's word for a key that needs a password
        raise UserError(f"{key_file} is encrypted; store it as a plain PEM file with mode 0600") from None
    except ValueError:
        raise UserError(
            f"{folder}: ca.pem or ca.key is not a PEM file; restore both, or remove both to start anew"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise UserError(f"{folder}: ca.key does not belong to ca.pem; restore both, or remove both to start anew")
    if certificate.not_valid_after_utc <= clock():
        raise UserError(f"{certificate_file} has expired; remove ca.pem and ca.key to start with a new CA")
    return Authority(certificate, key, clock)


def _check_private(key_file: Path) -> None:
    status = key_file.stat()
    if status.st_uid != os.geteuid():
        raise UserError(
            f"{key_file} belongs to user {status.st_uid}, and this is user {os.geteuid()}: "
            "point certs: at a folder that belongs to you"
        )
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{key_file} can be read by others; run: chmod 600 {key_file}")


def _create(folder: Path, certificate_file: Path, key_file: Path, now: datetime.datetime) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Sallyport CA {now:%Y-%m-%d}")])
    certificate = (
        _builder(name, name, key, CA_LIFETIME, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = _key_pem(key)
    _write(key_file, pem, 0o600)
    _write(certificate_file, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _key_pem(key: PrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), mode)
    os.replace(file.name, path)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, lifetime: datetime.timedelta, now: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


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
