"""The CA is made once and kept; its leaves are what today's clients accept."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from proxy.address import Host
from proxy.ca import MAX_LEAVES, Authority, load_pair
from proxy.certificate import BACKDATED, CA_LIFETIME, LEAF_LIFETIME
from proxy.problem import UserError

NOW = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.UTC)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime.datetime:
        return self.now


def make(folder: Path, clock: Clock | None = None) -> Authority:
    return load_pair(folder, clock or Clock())


def test_the_first_run_makes_a_ca_and_the_next_finds_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "certs"
    authority = make(folder)
    assert {path.name for path in folder.iterdir()} == {"ca.pem", "ca.key"}
    assert (folder / "ca.key").stat().st_mode & 0o777 == 0o600
    assert (folder / "ca.pem").stat().st_mode & 0o777 == 0o644
    assert (folder / "ca.pem").read_bytes() == authority.pem
    assert make(folder).pem == authority.pem


def test_the_ca_may_vouch_for_its_successor_and_nothing_below_that(tmp_path: Path) -> None:
    certificate = make(tmp_path).certificate
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 1)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)
    assert certificate.not_valid_before_utc == NOW - BACKDATED
    assert certificate.not_valid_after_utc == NOW + CA_LIFETIME
    assert "2030-01-01" in certificate.subject.rfc4514_string()


@pytest.mark.parametrize("name", ["a.test", "xn--bcher-kva.test", "10.0.0.1", "2001:db8::1"])
def test_a_strict_client_accepts_a_leaf(name: str, tmp_path: Path) -> None:
    """The verifier of cryptography follows RFC 5280 and the CA/Browser Forum to the letter."""
    authority, host = make(tmp_path), Host.parse(name)
    subject = x509.IPAddress(host.ip) if host.ip else x509.DNSName(host.name)
    verifier = PolicyBuilder().store(Store([authority.certificate])).time(NOW).build_server_verifier(subject)
    leaf = authority.leaf(host).certificate
    assert verifier.verify(leaf, []) == [leaf, authority.certificate]


def test_a_leaf_names_one_host_and_serves_it_alone(tmp_path: Path) -> None:
    leaf = make(tmp_path).leaf(Host("a.test")).certificate
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["a.test"]
    assert not names.critical
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert leaf.not_valid_before_utc == NOW - BACKDATED
    assert leaf.not_valid_after_utc == NOW + LEAF_LIFETIME


def test_a_name_too_long_for_the_subject_stands_in_the_alternative_name_alone(tmp_path: Path) -> None:
    """RFC 5280: 64 characters at most there, and without a subject the alternative name is critical."""
    authority = make(tmp_path)
    short, long = Host("a" * 59 + ".test"), Host("a" * 60 + ".test")
    assert authority.leaf(short).certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == short.name
    leaf = authority.leaf(long).certificate
    assert not list(leaf.subject)
    assert leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical


def test_leaves_differ_in_serial_number_and_share_a_key_that_is_not_the_cas(tmp_path: Path) -> None:
    authority = make(tmp_path)
    one, other = authority.leaf(Host("a.test")), authority.leaf(Host("b.test"))
    assert one.certificate.serial_number != other.certificate.serial_number
    assert one.key is other.key
    assert one.key.public_key() != authority.certificate.public_key()


def test_a_leaf_is_kept_for_half_its_life(tmp_path: Path) -> None:
    clock, minted = Clock(), []
    authority = make(tmp_path, clock)
    authority.on_mint = lambda: minted.append(clock.now)
    leaf = authority.leaf(Host("a.test"))
    clock.now = NOW + LEAF_LIFETIME / 2 - datetime.timedelta(seconds=1)
    assert authority.leaf(Host("a.test")) is leaf
    clock.now = NOW + LEAF_LIFETIME / 2
    renewed = authority.leaf(Host("a.test"))
    assert renewed.certificate.not_valid_after_utc == clock.now + LEAF_LIFETIME
    assert minted == [NOW, clock.now]


def test_the_leaves_kept_are_the_last_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_LEAVES >= 100
    monkeypatch.setattr("proxy.ca.MAX_LEAVES", 2)
    authority = make(tmp_path)
    first, second = authority.leaf(Host("a.test")), authority.leaf(Host("b.test"))
    assert authority.leaf(Host("a.test")) is first
    authority.leaf(Host("c.test"))
    assert authority.leaf(Host("a.test")) is first
    assert authority.leaf(Host("b.test")) is not second


def refused(folder: Path, clock: Clock | None = None) -> str:
    with pytest.raises(UserError) as error:
        make(folder, clock)
    text = str(error.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


def test_a_key_that_others_can_read_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "ca.key").chmod(0o640)
    assert refused(tmp_path).endswith(f"run: chmod 600 {tmp_path / 'ca.key'}")


@pytest.mark.parametrize("name", ["ca.key", "ca.pem"])
def test_half_a_ca_is_refused_and_not_replaced(name: str, tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / name).unlink()
    assert f"{name} is missing" in refused(tmp_path)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["ca.key", "ca.pem"])
@pytest.mark.parametrize(
    "content", [b"", b"not a PEM file", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_file_that_is_no_pem_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert "is not a PEM file" in refused(tmp_path)


def test_a_key_of_another_ca_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "two")
    os.replace(tmp_path / "two" / "ca.key", tmp_path / "one" / "ca.key")
    assert "does not belong to" in refused(tmp_path / "one")


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    key = rsa.generate_private_key(65537, 2048)
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (tmp_path / "ca.key").write_bytes(pem)
    assert "does not belong to" in refused(tmp_path)


def test_a_key_with_a_password_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    key = serialization.load_pem_private_key((tmp_path / "ca.key").read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"password")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    (tmp_path / "ca.key").write_bytes(pem)
    assert "is encrypted" in refused(tmp_path)


def test_a_ca_that_has_expired_is_refused(tmp_path: Path) -> None:
    clock = Clock()
    make(tmp_path, clock)
    clock.now = NOW + CA_LIFETIME
    assert "has expired" in refused(tmp_path, clock)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "certs").write_text("a file")
    assert "point certs:" in refused(tmp_path / "certs")
