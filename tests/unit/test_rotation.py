"""A CA is changed without a moment in which sandboxes that trust the old one, or the new one, are cut off."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from proxy.address import Host
from proxy.ca import Authority, write_pair, write_whole
from proxy.certificate import make_ca, new_key
from proxy.problem import UserError
from proxy.rotation import FILE, begin, finish, follow, load_authority
from tests.unit.test_ca import NOW, Clock

WEEK = datetime.timedelta(days=7)


def trusts(root: x509.Certificate, authority: Authority, now: datetime.datetime) -> bool:
    """Whether a sandbox with this root alone accepts what the proxy shows."""
    verifier = PolicyBuilder().store(Store([root])).time(now).build_server_verifier(x509.DNSName("a.test"))
    leaf = authority.leaf(Host("a.test"))
    try:
        verifier.verify(leaf.certificate, list(leaf.chain))
    except VerificationError:
        return False
    return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def old(tmp_path: Path, clock: Clock) -> x509.Certificate:
    return load_authority(tmp_path, clock).certificate


def test_during_the_overlap_either_root_does(tmp_path: Path, clock: Clock, old: x509.Certificate) -> None:
    new = begin(tmp_path, WEEK, clock).certificate
    for _ in range(2):
        authority = load_authority(tmp_path, clock)
        assert authority.trusted == (new, old)
        assert authority.pem.count(b"BEGIN CERTIFICATE") == 2
        assert trusts(old, authority, clock.now)
        assert trusts(new, authority, clock.now)
        clock.now += WEEK - datetime.timedelta(seconds=1)


def test_time_ends_it(tmp_path: Path, clock: Clock, old: x509.Certificate) -> None:
    new = begin(tmp_path, WEEK, clock).certificate
    clock.now += WEEK
    authority = load_authority(tmp_path, clock)
    assert authority.trusted == (new,)
    assert trusts(new, authority, clock.now)
    assert not trusts(old, authority, clock.now)
    assert not (tmp_path / FILE).exists()
    assert (tmp_path / "ca.pem").read_bytes() == authority.pem
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600


def test_finish_ends_it_now(tmp_path: Path, clock: Clock, old: x509.Certificate) -> None:
    new = begin(tmp_path, WEEK, clock).certificate
    finish(tmp_path, clock)
    assert not (tmp_path / FILE).exists()
    assert load_authority(tmp_path, clock).trusted == (new,)


def test_a_ca_that_may_vouch_for_no_other_goes_on_signing(tmp_path: Path, clock: Clock) -> None:
    """Its sandboxes would find no path to it; they have the overlap to fetch the new bundle."""
    key = new_key()
    old = make_ca("old", key, NOW)
    write_pair(tmp_path, old, key)
    rotation = begin(tmp_path, WEEK, clock)
    authority = load_authority(tmp_path, clock)
    assert rotation.cross is None
    assert authority.certificate == old
    assert authority.trusted == (rotation.certificate, old)
    assert trusts(old, authority, clock.now)
    clock.now += WEEK
    assert load_authority(tmp_path, clock).certificate == rotation.certificate


def test_one_rotation_at_a_time(tmp_path: Path, clock: Clock, old: x509.Certificate) -> None:
    with pytest.raises(UserError, match="no rotation is under way"):
        finish(tmp_path, clock)
    begin(tmp_path, WEEK, clock)
    with pytest.raises(UserError, match=r"until 2030-01-08 12:00 UTC: .*--finish"):
        begin(tmp_path, WEEK, clock)
    clock.now += WEEK
    assert begin(tmp_path, WEEK, clock).cross, "one that time has ended is no hindrance"


@pytest.mark.parametrize("killed_at", ["ca.key", "ca.pem", FILE])
def test_killed_half_way_the_new_ca_is_whole(
    killed_at: str, tmp_path: Path, clock: Clock, old: x509.Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of the three steps that put it in place."""
    new = begin(tmp_path, WEEK, clock).certificate

    def dying[**P](work: Callable[P, None]) -> Callable[P, None]:
        def step(*given: P.args, **options: P.kwargs) -> None:
            if getattr(given[0], "name", "") == killed_at:
                raise KeyboardInterrupt
            work(*given, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr("proxy.ca.write_whole", dying(write_whole))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            finish(tmp_path, clock)
    assert (tmp_path / FILE).exists()
    authority = load_authority(tmp_path, clock)
    assert authority.trusted == (new,)
    assert trusts(new, authority, clock.now)
    assert not (tmp_path / FILE).exists()


def test_a_folder_that_may_only_be_read_is_as_good(
    tmp_path: Path, clock: Clock, old: x509.Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates are often mounted; the successor counts although it cannot be put in place."""
    new = begin(tmp_path, WEEK, clock).certificate
    clock.now += WEEK

    def read_only(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("proxy.rotation.write_pair", read_only)
    assert load_authority(tmp_path, clock).certificate == new
    assert (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"key": "x", "certificate": "x", "cross": null, "until": "x"}']
)
def test_a_damaged_rotation_is_told(content: bytes, tmp_path: Path, clock: Clock, old: x509.Certificate) -> None:
    (tmp_path / FILE).write_bytes(content)
    (tmp_path / FILE).chmod(0o600)
    with pytest.raises(UserError, match=r"ca-next\.json is damaged; remove it"):
        load_authority(tmp_path, clock)


def following(authority: Authority, folder: Path, clock: Clock, steps: list[Callable[[], object]]) -> None:
    """Runs `follow`, and each step until it says something true."""

    async def run() -> None:
        task = asyncio.create_task(follow(authority, folder, clock))
        async with asyncio.timeout(10):
            for step in steps:
                while not step():  # noqa: ASYNC110  # files change, and a clock
                    await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(run())


def test_a_running_proxy_follows(
    tmp_path: Path, clock: Clock, old: x509.Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rotation, a file it cannot read, and the end by time."""
    monkeypatch.setattr("proxy.rotation.INTERVAL", 0.01)
    authority = load_authority(tmp_path, clock)
    first = authority.leaf(Host("a.test"))
    new: list[x509.Certificate] = []

    def rotate() -> bool:
        new.append(begin(tmp_path, WEEK, clock).certificate)
        return True

    def later() -> bool:
        clock.now += WEEK
        return True

    steps: list[Callable[[], object]] = [
        rotate,
        lambda: authority.certificate == new[0] and len(authority.trusted) == 2,
        lambda: authority.leaf(Host("a.test")) is not first,
        later,
        lambda: authority.trusted == (new[0],) and not authority.chain,
    ]
    following(authority, tmp_path, clock, steps)


def test_what_cannot_be_loaded_leaves_the_ca_that_signs(
    tmp_path: Path,
    clock: Clock,
    old: x509.Certificate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("proxy.rotation.INTERVAL", 0.01)
    authority = load_authority(tmp_path, clock)

    def damage() -> bool:
        (tmp_path / "ca.pem").write_text("no PEM")
        return True

    following(authority, tmp_path, clock, [damage, lambda: "goes on signing" in caplog.text])
    assert authority.certificate == old
