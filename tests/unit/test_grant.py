"""A credential goes where its own grant says, whatever a rule asks for."""

from __future__ import annotations

import json

import pytest

from proxy.agent import NEVER, Agent
from proxy.grant import Grant
from proxy.url import parse_url

CODER = Agent("coder-1")
EVERYTHING = Grant.parse(
    hosts=["api.test", "*.api.test:8443"],
    methods=["get", "POST"],
    paths=["/v1/**", "/health"],
    agents=["coder-*"],
    expires=100.0,
)


@pytest.mark.parametrize(
    ("method", "url", "agent", "now", "refusal"),
    [
        ("GET", "https://api.test/v1/x", "coder-1", 99.9, None),
        ("HEAD", "https://api.test/health", "coder-1", 0, None),
        ("POST", "https://api.test:1234/v1/", "coder-1", 0, None),
        ("GET", "https://a.api.test:8443/v1/x", "coder-1", 0, None),
        ("GET", "https://api.test/v1/x", "coder-1", 100.0, "expired"),
        ("GET", "https://other.test/v1/x", "coder-1", 0, "host"),
        ("GET", "https://a.api.test/v1/x", "coder-1", 0, "host"),
        ("GET", "https://b.a.api.test:8443/v1/x", "coder-1", 0, "host"),
        ("GET", "https://api.test.evil.test/v1/x", "coder-1", 0, "host"),
        ("PUT", "https://api.test/v1/x", "coder-1", 0, "method"),
        ("POST", "https://api.test/v1/x?_method=get", "coder-1", 0, "method"),
        ("GET", "https://api.test/v2/x", "coder-1", 0, "path"),
        ("GET", "https://api.test/v1/..%2fv2", "coder-1", 0, "path"),
        ("GET", "https://api.test/health%2fx", "coder-1", 0, "path"),
        ("GET", "https://api.test/v1/x", "other", 0, "agent"),
        ("GET", "https://api.test/v1/x", "xcoder-1", 0, "agent"),
    ],
)
def test_every_part_of_a_grant_limits_the_use(
    method: str, url: str, agent: str, now: float, refusal: str | None
) -> None:
    assert EVERYTHING.refusal(Agent(agent), parse_url(method, url), now) == refusal


def test_a_grant_of_hosts_alone_leaves_the_rest_open() -> None:
    grant = Grant.parse(hosts=["api.test"])
    assert grant.refusal(CODER, parse_url("DELETE", "http://api.test:8080/x"), 1e12) is None
    assert grant.expires == NEVER


def test_a_method_that_is_not_get_includes_no_head() -> None:
    grant = Grant.parse(hosts=["api.test"], methods=["POST"])
    assert grant.refusal(CODER, parse_url("HEAD", "https://api.test/"), 0) == "method"


@pytest.mark.parametrize(
    ("host", "url", "covered"),
    [
        ("[::1]:443", "https://[::1]/", True),
        ("[::1]:444", "https://[::1]/", False),
        ("::1", "https://[::1]:444/", True),
        ("[::1]", "https://[::1]:444/", True),
        ("2001:db8::443", "https://[2001:db8::443]/", True),
        ("10.0.0.1:80", "http://10.0.0.1/", True),
        ("**:443", "https://any.test/", True),
        ("**:443", "https://any.test:444/", False),
    ],
)
def test_a_host_may_have_a_port(host: str, url: str, covered: bool) -> None:
    assert Grant.parse(hosts=[host]).covers_host(parse_url("GET", url)) is covered


@pytest.mark.parametrize(
    "host", ["", "Api.test", "api.test:0", "api.test:65536", "api.test:", "https://api.test", "api.test/x"]
)
def test_a_host_in_another_form_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        Grant.parse(hosts=[host])


def test_a_grant_needs_a_host() -> None:
    with pytest.raises(ValueError, match="at least one host"):
        Grant.parse(hosts=[])


def test_an_expiry_that_never_comes_is_refused() -> None:
    with pytest.raises(ValueError, match="not a time"):
        Grant.parse(hosts=["api.test"], expires=float("nan"))


def test_a_path_must_be_in_normal_form() -> None:
    with pytest.raises(ValueError, match="normal form"):
        Grant.parse(hosts=["api.test"], paths=["/a/../b"])


@pytest.mark.parametrize("grant", [EVERYTHING, Grant.parse(hosts=["**"])])
def test_a_grant_survives_json(grant: Grant) -> None:
    """It is associated data of a sealed record: the same grant gives the same text."""
    data = json.loads(json.dumps(grant.canonical(), allow_nan=False))
    assert Grant.from_canonical(data) == grant
    assert Grant.from_canonical(data).canonical() == grant.canonical()


@pytest.mark.parametrize(
    "change",
    [
        {"hosts": "api.test"},
        {"hosts": [1]},
        {"hosts": []},
        {"hosts": None},
        {"methods": None},
        {"paths": {"a": 1}},
        {"agents": [None]},
        {"expires": "1"},
        {"expires": float("nan")},
    ],
)
def test_other_data_is_no_grant(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"a grant's|at least one host|not a time"):
        Grant.from_canonical(EVERYTHING.canonical() | change)


def test_a_grant_shows_what_was_written_only() -> None:
    assert "_paths" not in repr(EVERYTHING)
    assert "/v1/**" in repr(EVERYTHING)
