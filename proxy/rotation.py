"""Changing the CA while sandboxes that trust the old one go on: its successor, kept beside it until an overlap ends.

One file, `ca-next.json`, holds the whole successor, so that whoever is killed leaves either the old state or the new.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from proxy.ca import CERTIFICATE, KEY, Authority, load_pair, new_ca, write_pair
from proxy.certificate import Clock, PrivateKey, cross_sign, key_pem, may_sign_a_ca, pem, utc_now
from proxy.files import locked, read_private, write_private
from proxy.problem import UserError
from proxy.sandboxenv import refresh_bundle

FILE = "ca-next.json"
INTERVAL = 0.5  # seconds between two looks of a running proxy

_log = logging.getLogger("sallyport")


@dataclass(frozen=True)
class Rotation:
    """The successor of a CA. `cross`: its certificate from the old CA, None where that may sign no other CA."""

    until: datetime.datetime
    certificate: x509.Certificate
    key: PrivateKey
    cross: x509.Certificate | None

    @staticmethod
    def read(folder: Path) -> Rotation | None:
        """The rotation under way in `folder`, if there is one. Raises UserError."""
        path = folder / FILE
        if not folder.is_dir():
            return None
        try:
            data = json.loads(read_private(path))
            key = serialization.load_pem_private_key(data["key"].encode(), None)
            certificate = x509.load_pem_x509_certificate(data["certificate"].encode())
            cross = x509.load_pem_x509_certificate(data["cross"].encode()) if data["cross"] else None
            until = datetime.datetime.fromisoformat(data["until"])
            if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
                raise ValueError
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path} is damaged; remove it to stay with the old CA") from None
        return Rotation(until, certificate, key, cross)

    def write(self, folder: Path) -> None:
        """Keep it, whole or not at all. Raises OSError."""
        data = {
            "until": self.until.isoformat(),
            "certificate": pem(self.certificate).decode(),
            "cross": pem(self.cross).decode() if self.cross else None,
            "key": key_pem(self.key).decode(),
        }
        write_private(folder / FILE, json.dumps(data).encode())


def load_authority(folder: Path, clock: Clock = utc_now) -> Authority:
    """The CA in `folder`, made there if there is none, with its successor where one is on its way.

    During the overlap sandboxes are to trust both. The new CA signs, vouched for by the old one, or where that may not
    vouch for another CA, the old one goes on signing.

    Raises UserError.
    """
    rotation = Rotation.read(folder)
    if rotation and rotation.until <= clock():
        with contextlib.suppress(UserError), _changing(folder):  # a folder that may only be read is as good
            _settle(folder, clock)
        return Authority(rotation.certificate, rotation.key, clock)
    current = load_pair(folder, clock)
    if rotation is None:
        return current
    both = (rotation.certificate, current.certificate)
    until = rotation.until
    if rotation.cross is None:
        return Authority(current.certificate, current.key, clock, trusted=both, until=until)
    return Authority(rotation.certificate, rotation.key, clock, chain=(rotation.cross,), trusted=both, until=until)


def begin(folder: Path, overlap: datetime.timedelta, clock: Clock = utc_now) -> Rotation:
    """Make the successor; both are trusted for the length of `overlap`. Raises UserError."""
    with _changing(folder):
        _settle(folder, clock)
        if under_way := Rotation.read(folder):
            raise UserError(
                f"a rotation is under way until {shown(under_way.until)}: `sallyport ca rotate --finish` ends it now"
            )
        old, now = load_pair(folder, clock), clock()
        certificate, key = new_ca(now)
        signs = may_sign_a_ca(old.certificate)
        cross = cross_sign(certificate, old.certificate, old.key, now, now + overlap) if signs else None
        rotation = Rotation(now + overlap, certificate, key, cross)
        rotation.write(folder)
    return rotation


def finish(folder: Path, clock: Clock = utc_now) -> None:
    """End the overlap now: only the new CA is left. Raises UserError."""
    with _changing(folder):
        rotation = Rotation.read(folder)
        if rotation is None:
            raise UserError("no rotation is under way: `sallyport ca rotate` begins one")
        replace(rotation, until=min(rotation.until, clock())).write(folder)
        _settle(folder, clock)


def shown(moment: datetime.datetime) -> str:
    """A time as messages show it."""
    return f"{moment:%Y-%m-%d %H:%M} UTC"


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """One at a time. Raises UserError."""
    try:
        with locked(folder / "ca.lock", "another process changes the CA"):
            yield
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; make the certs folder writable") from None


def _settle(folder: Path, clock: Clock) -> None:
    """Put a successor whose time has come in the old CA's place. Its file is what counts until the last step."""
    rotation = Rotation.read(folder)
    if rotation and rotation.until <= clock():
        write_pair(folder, rotation.certificate, rotation.key)
        (folder / FILE).unlink()


async def follow(authority: Authority, folder: Path, clock: Clock = utc_now) -> None:
    """Have `authority` become what `folder` says, whenever that changes or an overlap ends, until cancelled."""
    seen: object = None
    while True:
        await asyncio.sleep(INTERVAL)
        looked = _look(folder)
        if looked == seen and not (authority.until and authority.until <= clock()):
            continue
        seen = looked
        try:
            if authority.become(await asyncio.to_thread(load_authority, folder, clock)):
                refresh_bundle(folder, authority.pem)
                _log.info("the CA changed: %s signs", authority.certificate.subject.rfc4514_string())
        except UserError as error:
            _log.error("%s; the CA that was loaded goes on signing", error)


def _look(folder: Path) -> object:
    """What differs when one of the files does."""
    found: list[object] = []
    for name in (FILE, CERTIFICATE, KEY):
        try:
            status = (folder / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_mtime_ns, status.st_ino, status.st_size))
    return found
