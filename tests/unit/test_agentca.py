"""An agent's own CA vouches for the hosts of its rules alone, and ends with the agent."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from proxy.address import Host, HostPattern
from proxy.agent import Agent, AgentState
from proxy.agentca import AgentAuthorities, constraints_for, forget, hosts_of, issue
from proxy.ca import Authority
from proxy.certificate import CA_LIFETIME
from proxy.problem import UserError
from proxy.rulefile import load_policy
from tests.unit.test_ca import NOW, Clock
from tests.unit.test_certificate import accepts

ONE = Agent("coder-1", {"team": "a"}, state=AgentState.ACTIVE)
OTHER = Agent("other", state=AgentState.ACTIVE)


def hosts(rules: str, agent: Agent = ONE) -> list[str] | None:
    policy, _ = load_policy({"r.yaml": f"version: 1\nrules:\n{rules}".encode()})
    found = hosts_of(policy, agent)
    return None if found is None else [str(pattern) for pattern in found]


def test_the_hosts_are_those_that_rules_allow_the_agent() -> None:
    rules = """
  - {name: a, action: allow, match: {host: [a.test, "**.b.test"]}}
  - {name: b, action: block, match: {host: no.test}}
  - {name: c, action: allow, agents: other, match: {host: other.test}}
  - {name: d, action: allow, agents: {labels: {team: a}}, match: {host: team.test}}
"""
    assert hosts(rules) == ["a.test", "**.b.test", "team.test"]
    assert hosts(rules, OTHER) == ["a.test", "**.b.test", "other.test"]


@pytest.mark.parametrize("match", ["{method: GET}", '{host: "**"}'])
def test_a_rule_for_every_host_leaves_no_limit(match: str) -> None:
    assert hosts(f"  - {{name: a, action: allow, match: {match}}}") is None


def test_no_rule_no_host() -> None:
    assert hosts("  - {name: a, action: allow, agents: other, match: {host: a.test}}") == []


def authority(folder: Path, *patterns: str) -> Authority:
    return issue(folder, ONE, constraints_for(HostPattern.parse(text) for text in patterns))


@pytest.mark.parametrize(
    ("patterns", "name", "accepted"),
    [
        (["a.test"], "a.test", True),
        (["a.test"], "b.test", False),
        (["a.test"], "10.0.0.1", False),
        (["**.b.test"], "x.y.b.test", True),
        (["**.b.test"], "xb.test", False),
        (["10.0.0.1"], "10.0.0.1", True),
        (["10.0.0.1"], "10.0.0.2", False),
        (["10.0.0.1"], "2001:db8::1", False),
        (["10.0.0.1"], "a.test", False),
        (["2001:db8::1", "a.test"], "2001:db8::1", True),
        ([], "a.test", False),
        ([], "10.0.0.1", False),
    ],
)
def test_a_strict_client_holds_the_ca_to_its_hosts(
    patterns: list[str], name: str, accepted: bool, tmp_path: Path
) -> None:
    ca = authority(tmp_path, *patterns)
    leaf = ca.leaf(Host.parse(name))
    if accepted:
        accepts(ca.certificate, leaf, name)
    else:
        with pytest.raises(ssl.SSLCertVerificationError, match="subtree violation"):
            accepts(ca.certificate, leaf, name)


def test_it_is_made_once_and_its_key_stays(tmp_path: Path) -> None:
    """Sandboxes that trust an earlier certificate of the key go on when rules change."""
    first = authority(tmp_path, "a.test")
    assert authority(tmp_path, "a.test").certificate == first.certificate
    wider = authority(tmp_path, "a.test", "b.test")
    assert wider.certificate != first.certificate
    accepts(first.certificate, wider.leaf(Host("a.test")), "a.test")
    file = tmp_path / "agents" / "coder-1.pem"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_agents_do_not_trust_each_others(tmp_path: Path) -> None:
    one, other = issue(tmp_path, ONE), issue(tmp_path, OTHER)
    with pytest.raises(ssl.SSLError):
        accepts(one.certificate, other.leaf(Host("a.test")), "a.test")


def test_it_expires_with_the_agent(tmp_path: Path) -> None:
    ends = NOW + datetime.timedelta(hours=8)
    agent = Agent("coder-1", expires=ends.timestamp(), state=AgentState.ACTIVE)
    clock = Clock()
    assert issue(tmp_path, agent, clock=clock).certificate.not_valid_after_utc == ends
    assert issue(tmp_path, ONE, clock=clock).certificate.not_valid_after_utc == NOW + CA_LIFETIME
    clock.now += datetime.timedelta(days=1)
    assert issue(tmp_path, ONE, clock=clock).certificate.not_valid_after_utc == NOW + CA_LIFETIME


def test_a_running_proxy_signs_with_the_file_as_it_is_now(tmp_path: Path) -> None:
    """Killed and revived, an agent has another CA."""
    minted: list[int] = []
    authorities = AgentAuthorities(tmp_path, lambda: minted.append(1))
    first = authorities.of(ONE)
    assert authorities.of(ONE) is first
    assert issue(tmp_path, ONE).certificate == first.certificate
    forget(tmp_path, "coder-1")
    second = authorities.of(ONE)
    assert second.key != first.key
    second.leaf(Host("a.test"))
    assert minted == [1]


def test_what_is_no_agents_id_is_no_file(tmp_path: Path) -> None:
    """`agent kill ../../x` deletes nothing."""
    (tmp_path / "x.pem").touch()
    with pytest.raises(UserError, match="cannot be an agent id"):
        forget(tmp_path / "certs", "../../x")
    assert (tmp_path / "x.pem").exists()


def files(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "agents").iterdir()}


def test_it_is_deleted_with_the_agent(tmp_path: Path) -> None:
    clock = Clock()
    clock.now = datetime.datetime.now(datetime.UTC)
    authorities = AgentAuthorities(tmp_path, lambda: None, clock)
    for agent in (ONE, OTHER):
        authorities.of(agent)
    authorities.end({"other", "nobody"}, lambda _: True)
    assert files(tmp_path) == {"coder-1", "other"}
    authorities.end({"other", "nobody"}, lambda _: False)
    assert files(tmp_path) == {"coder-1"}
    authorities.end(None, lambda _: False)
    assert files(tmp_path) == {"coder-1"}, "it may be of an agent that was added a moment ago"
    clock.now += datetime.timedelta(minutes=2)
    authorities.end(None, lambda _: False)
    assert files(tmp_path) == set()
    AgentAuthorities(tmp_path / "none", lambda: None).end(None, lambda _: False)


def test_all_can_be_forgotten(tmp_path: Path) -> None:
    issue(tmp_path, ONE)
    issue(tmp_path, OTHER)
    forget(tmp_path, None)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_file_is_told(content: bytes, tmp_path: Path) -> None:
    issue(tmp_path, ONE)
    (tmp_path / "agents" / "coder-1.pem").write_bytes(content)
    with pytest.raises(UserError, match="is damaged; delete it"):
        issue(tmp_path, ONE)


def test_a_certificate_of_another_key_is_told(tmp_path: Path) -> None:
    issue(tmp_path, ONE)
    issue(tmp_path, OTHER)
    one, other = (tmp_path / "agents" / f"{name}.pem" for name in ("coder-1", "other"))
    key, certificate = one.read_bytes(), other.read_bytes()
    mark = b"-----BEGIN CERTIFICATE"
    one.write_bytes(key[: key.index(mark)] + certificate[certificate.index(mark) :])
    with pytest.raises(UserError, match="another key"):
        issue(tmp_path, ONE)


def test_the_name_tells_cas_of_one_agent_apart(tmp_path: Path) -> None:
    first = issue(tmp_path, ONE).certificate
    forget(tmp_path, "coder-1")
    second = issue(tmp_path, ONE).certificate
    assert isinstance(first, x509.Certificate)
    assert first.subject != second.subject
    assert "coder-1" in first.subject.rfc4514_string()
