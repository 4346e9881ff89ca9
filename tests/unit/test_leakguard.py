"""The guard knows what may not leave as soon as the vault and the canaries were loaded, and not before."""

from __future__ import annotations

import asyncio

import pytest

from proxy import leakguard
from proxy.address import Host
from proxy.grant import Grant
from proxy.leakguard import Leaked, LeakGuard, look_through
from proxy.reason import Reason
from proxy.request import RequestView
from proxy.secret import Secret
from proxy.upstream import Refused
from proxy.vault import Opening

SECRET = b"tok-4f1e9b7c2d8a"


def view(target: str = "/", host: str = "other.test", **headers: str) -> RequestView:
    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    return RequestView.parse("GET", "https", Host.parse(host), 443, target, fields)


def opening(name: str, secret: bytes = SECRET, host: str = "api.test") -> Opening:
    return name, Secret(secret), {}, Grant.parse(hosts=[host])


def guard(*openings: Opening) -> LeakGuard:
    made = LeakGuard(lambda token: False)
    asyncio.run(made.credentials(None, openings))
    asyncio.run(made.canaries(None, {}))
    return made


def leak(made: LeakGuard, request: RequestView) -> tuple[str, str, str] | None:
    try:
        made.check(request, request, formats=False)
        return None
    except Leaked as leaked:
        found = leaked
    assert found.reason is Reason.SECRET_LEAK
    assert SECRET.decode() not in found.detail
    return found.what


def test_until_everything_is_loaded_nothing_leaves() -> None:
    made = LeakGuard(lambda token: False)
    for load in (None, made.credentials(None, [])):
        if load:
            asyncio.run(load)
        with pytest.raises(Refused) as caught:
            made.check(view(), view(), formats=False)
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
    asyncio.run(made.canaries(None, {}))
    made.check(view(), view(), formats=False)


def test_it_follows_changes() -> None:
    made = guard(opening("a"), opening("b", b"other-secret-1"))
    assert leak(made, view(x=SECRET.decode())) == ("credential", "a", "header")
    asyncio.run(made.credentials({"a"}, [opening("a", b"newer-secret-2")]))
    assert leak(made, view(x=SECRET.decode())) is None
    assert leak(made, view("/?k=newer-secret-2")) == ("credential", "a", "url")
    assert leak(made, view("/other-secret-1")) == ("credential", "b", "url")
    asyncio.run(made.credentials({"a"}, []))
    assert leak(made, view("/?k=newer-secret-2")) is None
    asyncio.run(made.canaries({"trap"}, {"trap": b"sk-live-12345678"}))
    assert leak(made, view(x="sk-live-12345678")) == ("canary", "trap", "header")


def test_a_placeholder_may_go_where_its_credential_may() -> None:
    made = guard(opening("git"), opening("github", b"other-secret-1", "b.test"))
    mark = "slp_placeholder_git"
    assert leak(made, view(host="api.test", x=mark)) is None
    assert leak(made, view(host="b.test", x=mark)) == ("placeholder", "git", "header")
    assert leak(made, view(host="b.test", x=f"{mark}hub")) is None
    assert leak(made, view(host="b.test", x=f"{mark}hub {SECRET.decode()}")) == ("credential", "git", "header")


def test_a_credential_without_a_grant_is_guarded_too() -> None:
    made = guard(("gateway", Secret(SECRET), {}, None))
    assert leak(made, view(x=SECRET.decode())) == ("credential", "gateway", "header")


def test_what_is_beyond_the_bound_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(leakguard, "MAX_SECRETS", 1)
    made = guard(opening("a"), opening("b", b"other-secret-1"))
    assert leak(made, view(x=SECRET.decode())) is not None
    assert leak(made, view(x="other-secret-1")) is None
    assert "more than 1 credentials and canaries" in caplog.text


def test_a_refused_url_that_tells_a_secret_is_hidden() -> None:
    made = guard(opening("a"))
    assert made.hides(view(f"/{SECRET.decode()}"), Refused(Reason.NO_RULE))
    assert not made.hides(view("/slp_placeholder_a"), Refused(Reason.NO_RULE))


def test_a_body_is_looked_through_to_its_end() -> None:
    made = guard(opening("a"))
    stream = made.stream(view(), "", formats=False)
    held = look_through(stream, b"a tok-4f1e9b", view()) + look_through(stream, b"", view())
    assert held == b"a tok-4f1e9b"
    with pytest.raises(Leaked) as caught:
        made.check_message(b"said " + SECRET, view(), formats=False)
    assert caught.value.what == ("credential", "a", "websocket")


def test_it_shows_no_secret() -> None:
    made = guard(opening("a"))
    assert SECRET.decode() not in repr(made)
