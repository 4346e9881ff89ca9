"""The certificate authority sandboxes trust: made on the first run, loaded with what a rotation has under way."""

from __future__ import annotations

import datetime
import os
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from proxy.address import Host
from proxy.certificate import (
    LEAF_LIFETIME,
    Clock,
    PrivateKey,
    key_pem,
    leaves_of,
    make_ca,
    make_leaf,
    new_key,
    pem,
    utc_now,
)
from proxy.problem import UserError

MAX_LEAVES = 1000
CERTIFICATE, KEY = "ca.pem", "ca.key"


@dataclass(frozen=True, eq=False)
class Leaf:
    """A certificate for one host, the key all leaves of a CA share, and what stands between it and older roots."""

    certificate: x509.Certificate
    key: PrivateKey
    key_pem: bytes
    chain: tuple[x509.Certificate, ...] = ()

    @cached_property
    def pem(self) -> bytes:
        """Key and certificates, as the standard library's ssl loads them."""
        return self.key_pem + self.certificates_pem

    @property
    def certificates_pem(self) -> bytes:
        """The certificates alone."""
        return pem(self.certificate, *self.chain)

    @cached_property
    def renew(self) -> datetime.datetime:
        """When a new one is minted: after half its life."""
        return self.certificate.not_valid_after_utc - LEAF_LIFETIME / 2


class Authority:
    """A CA and its bounded cache of leaves, which share a key. `chain` is sent behind each leaf, `trusted` are the
    roots to hand out. Where a rotation is under way it ends at `until`."""

    def __init__(
        self,
        certificate: x509.Certificate,
        key: PrivateKey,
        clock: Clock = utc_now,
        *,
        chain: Sequence[x509.Certificate] = (),
        trusted: Sequence[x509.Certificate] = (),
        until: datetime.datetime | None = None,
    ) -> None:
        self.certificate = certificate
        self.key = key
        self.chain = tuple(chain)
        self.trusted = tuple(trusted) or (certificate,)
        self.until = until
        self.on_mint: Callable[[], None] = lambda: None
        self._clock = clock
        self._leaf_key = new_key()
        self._leaf_key_pem = key_pem(self._leaf_key)
        self._leaves_of = leaves_of(self._leaf_key, certificate)
        self._leaves: OrderedDict[Host, Leaf] = OrderedDict()

    @property
    def pem(self) -> bytes:
        """The certificates a sandbox must trust: one, and two while a rotation is under way."""
        return pem(*self.trusted)

    def become(self, other: Authority) -> bool:
        """Sign as `other` does from now on; whether that is another than before."""
        same = (self.certificate, self.chain, self.trusted) == (other.certificate, other.chain, other.trusted)
        self.certificate, self.key, self.until = other.certificate, other.key, other.until
        self.chain, self.trusted = other.chain, other.trusted
        if not same:
            self._leaves.clear()
            self._leaves_of = leaves_of(self._leaf_key, self.certificate)
        return not same

    def has(self, host: Host) -> bool:
        """Whether the certificate for `host` is there already."""
        return host in self._leaves

    def leaf(self, host: Host) -> Leaf:
        """The certificate to show for `host`."""
        leaf = self._leaves.get(host)
        if leaf is None or self._clock() >= leaf.renew:
            certificate = make_leaf(host, self._leaves_of, self.key, self._clock())
            leaf = self._leaves[host] = Leaf(certificate, self._leaf_key, self._leaf_key_pem, self.chain)
            self.on_mint()
            if len(self._leaves) > MAX_LEAVES:
                self._leaves.popitem(last=False)
        self._leaves.move_to_end(host)
        return leaf


def load_pair(folder: Path, clock: Clock = utc_now) -> Authority:
    """The CA in `folder` (`ca.pem`, `ca.key`), made there if neither file exists.

    Raises UserError.
    """
    certificate_file, key_file = folder / CERTIFICATE, folder / KEY
    try:
        if not certificate_file.exists() and not key_file.exists():
            _create(folder, clock())
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


def new_ca(now: datetime.datetime) -> tuple[x509.Certificate, PrivateKey]:
    """A CA with a name of its own, that may once vouch for its successor."""
    key = new_key()
    return make_ca(f"Sallyport CA {now:%Y-%m-%d} {os.urandom(3).hex()}", key, now, below=1), key


def _create(folder: Path, now: datetime.datetime) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    write_pair(folder, *new_ca(now))


def write_pair(folder: Path, certificate: x509.Certificate, key: PrivateKey) -> None:
    """Puts a CA in place, the key first. Raises OSError."""
    write_whole(folder / KEY, key_pem(key), 0o600)
    write_whole(folder / CERTIFICATE, pem(certificate), 0o644)


def write_whole(path: Path, data: bytes, mode: int) -> None:
    """Makes `path` hold `data`, whole or not at all. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
