"""Every proof that is shown must name the same agent."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_network

import pytest

from proxy.agent import Agent
from proxy.identity import Identified, Identity, Issuer
from proxy.proof import Proof, Told
from proxy.reason import Reason

ALICE = Agent("alice")
BOB = Agent("bob", expires=100.0)
NETWORKS = {
    "10.0.0.0/8": "alice",
    "10.1.0.0/16": "bob",
    "10.1.2.3/32": "alice",
    "2001:db8::/32": "bob",
    "10.9.0.0/16": "gone",
}


class TwoAgents:
    """What identifying needs of a registry."""

    def by_token(self, token: str) -> Agent | None:
        return {"token-a": ALICE, "token-b": BOB}.get(token)

    def by_id(self, agent_id: str) -> Agent | None:
        return {"alice": ALICE, "bob": BOB}.get(agent_id)


def identify(
    *authorization: str,
    source: str = "192.0.2.1",
    listener: str | None = None,
    now: float = 0.0,
    token: bool = True,
    networks: Mapping[str, str] = NETWORKS,
    issuers: Sequence[Issuer] = (),
    shown: Sequence[Proof] = (),
) -> Identified:
    parsed = {ip_network(network): agent for network, agent in networks.items()}
    identity = Identity(TwoAgents(), token=token, networks=parsed, issuers=issuers)
    return identity.identify(authorization, (*identity.of_connection(source, listener), *shown), now)


def basic(pair: str) -> str:
    return "Basic " + base64.b64encode(pair.encode()).decode()


def named(found: Identified, agent: Agent, *proofs: str) -> None:
    assert found == Identified(agent, proofs, Reason.ALLOWED)


def test_without_a_proof_there_is_no_agent() -> None:
    assert identify() == Identified()
    assert Identified().agent is None
    assert Identified().reason is Reason.NO_IDENTITY


@pytest.mark.parametrize(
    "value",
    [
        "Bearer token-a",
        "bearer  token-a ",
        basic("alice:token-a"),
        basic(":token-a"),
        basic("alice:token-a").replace("Basic", "BASIC "),
    ],
)
def test_a_token_names_its_agent(value: str) -> None:
    named(identify(value), ALICE, "token")


@pytest.mark.parametrize(
    "value",
    [
        "Bearer wrong",
        "Bearer",
        "",
        "token-a",
        "Digest token-a",
        "Basic token-a",
        "Basic !!!!",
        basic("token-a"),
        basic("alice"),
        basic("alice:token-a:x"),
        "Basic " + base64.b64encode(b"\xff:token-a").decode(),
        basic("alice:token-a") + ", Bearer token-a",
    ],
)
def test_what_holds_no_token_is_a_bad_proof(value: str) -> None:
    """Not none: the client meant to prove something."""
    assert identify(value) == Identified(reason=Reason.BAD_IDENTITY)


def test_a_user_name_must_be_the_tokens_agent() -> None:
    assert identify(basic("bob:token-a")).reason is Reason.IDENTITY_CONFLICT
    assert identify(basic("Alice:token-a")).reason is Reason.IDENTITY_CONFLICT


@pytest.mark.parametrize(
    ("source", "agent"),
    [
        ("10.2.0.1", ALICE),
        ("10.1.9.9", BOB),
        ("10.1.2.3", ALICE),
        ("::ffff:10.1.9.9", BOB),
        ("2001:db8::5", BOB),
        ("2001:db8::5%eth0", BOB),
    ],
)
def test_the_most_specific_network_names_its_agent(source: str, agent: Agent) -> None:
    named(identify(source=source), agent, "network")


@pytest.mark.parametrize("source", ["192.0.2.1", "", "unix", "::a0a:a0a"])
def test_another_source_proves_nothing(source: str) -> None:
    assert identify(source=source) == Identified()
    assert identify(source=source, networks={}) == Identified()


def test_a_network_of_an_agent_who_is_gone_is_a_bad_proof() -> None:
    assert identify(source="10.9.0.1").reason is Reason.BAD_IDENTITY
    assert identify("Bearer token-a", source="10.9.0.1").reason is Reason.BAD_IDENTITY


def test_a_listener_names_its_agent() -> None:
    named(identify(listener="alice"), ALICE, "listener")
    assert identify(listener="gone").reason is Reason.BAD_IDENTITY


def test_proofs_that_agree_are_all_told() -> None:
    named(identify("Bearer token-a", source="10.2.0.1", listener="alice"), ALICE, "token", "network", "listener")
    named(identify("Bearer token-a", basic("alice:token-a")), ALICE, "token")


@pytest.mark.parametrize(
    ("authorization", "source", "listener"),
    [
        (["Bearer token-a", "Bearer token-b"], "192.0.2.1", None),
        (["Bearer token-a"], "10.1.9.9", None),
        (["Bearer token-a"], "192.0.2.1", "bob"),
        ([], "10.2.0.1", "bob"),
        (["Bearer token-a"], "10.2.0.1", "bob"),
    ],
)
def test_proofs_that_name_two_agents_are_refused(
    authorization: Iterable[str], source: str, listener: str | None
) -> None:
    assert identify(*authorization, source=source, listener=listener) == Identified(reason=Reason.IDENTITY_CONFLICT)


def test_one_bad_proof_spoils_the_good_ones() -> None:
    assert identify("Bearer token-a", "Bearer wrong").reason is Reason.BAD_IDENTITY
    assert identify("Bearer wrong", source="10.2.0.1").reason is Reason.BAD_IDENTITY


def test_an_agent_is_nobody_from_its_expiry_on() -> None:
    named(identify("Bearer token-b", now=99.9), BOB, "token")
    assert identify("Bearer token-b", now=100.0).reason is Reason.BAD_IDENTITY
    assert identify(source="10.1.9.9", now=100.0).reason is Reason.BAD_IDENTITY


def test_tokens_may_be_switched_off() -> None:
    assert identify("Bearer token-a", token=False) == Identified()
    named(identify("Bearer token-a", token=False, listener="bob"), BOB, "listener")


class Signed:
    """An issuer of tokens for bob until 50, on behalf of ada."""

    def __init__(self, *, keys: bool = True) -> None:
        self.keys = keys

    def __bool__(self) -> bool:
        return self.keys

    def verify(self, token: str, now: float) -> Proof | None:
        told = Told({"team": "web"}, "ada")
        return Proof("gateway:one", "bob", 50.0, told) if token == "signed" else None


def test_a_signed_token_names_its_agent_and_tells_about_it() -> None:
    found = identify("Bearer signed", issuers=[Signed()])
    assert found.agent
    assert (found.agent.id, found.agent.labels, found.agent.on_behalf_of) == ("bob", {"team": "web"}, "ada")
    assert (found.proofs, found.reason) == (("gateway:one",), Reason.ALLOWED)
    assert identify(basic("bob:signed"), issuers=[Signed()]).agent == found.agent


def test_a_signed_token_and_another_proof_must_agree() -> None:
    assert identify(basic("alice:signed"), issuers=[Signed()]).reason is Reason.IDENTITY_CONFLICT
    assert identify("Bearer signed", "Bearer token-a", issuers=[Signed()]).reason is Reason.IDENTITY_CONFLICT
    assert identify("Bearer signed", listener="alice", issuers=[Signed()]).reason is Reason.IDENTITY_CONFLICT
    assert identify("Bearer signed", "Bearer token-b", issuers=[Signed()]).proofs == ("gateway:one", "token")


def test_a_proof_ends() -> None:
    assert identify("Bearer signed", issuers=[Signed()], now=50.0).reason is Reason.BAD_IDENTITY
    late = Proof("mtls", "alice", expires=10.0)
    named(identify(shown=[late], now=9.0), ALICE, "mtls")
    assert identify(shown=[late], now=10.0).reason is Reason.BAD_IDENTITY


def test_without_any_issuer_or_tokens_the_header_proves_nothing() -> None:
    """And with one of them, whatever stands there must be a proof."""
    assert identify("Bearer wrong", token=False, issuers=[Signed(keys=False)]) == Identified()
    assert identify("Bearer wrong", token=False, issuers=[Signed()]).reason is Reason.BAD_IDENTITY
    assert identify("Bearer token-a", token=False, issuers=[Signed()]).reason is Reason.BAD_IDENTITY


def test_what_the_operator_registered_wins_over_what_a_proof_tells() -> None:
    agent = Agent("alice", {"team": "payments"}, "eve")
    assert Told({"team": "web", "tier": "1"}, "ada").about(agent).labels == {"team": "payments", "tier": "1"}
    assert Told({}, "ada").about(agent).on_behalf_of == "eve"
