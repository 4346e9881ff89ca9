"""An exchange says refused until everything has been decided."""

from __future__ import annotations

from proxy.agent import Agent
from proxy.exchange import Exchange
from proxy.reason import Reason


def test_an_exchange_that_nobody_filled_in_is_a_refusal() -> None:
    exchange = Exchange("id", 0.0, "listener", "client")
    assert (exchange.allowed, exchange.reason, exchange.verdict) == (False, Reason.INTERNAL, "block")
    assert exchange.agent_id == ""


def test_an_exchange_tells_its_agent_and_verdict() -> None:
    exchange = Exchange("id", 0.0, "listener", "client", Agent("coder-1"), allowed=True)
    assert (exchange.agent_id, exchange.verdict) == ("coder-1", "allow")


def test_exchanges_share_nothing() -> None:
    one, other = Exchange("1", 0.0, "", ""), Exchange("2", 0.0, "", "")
    one.count_redacted({"key": 1}, "body")
    one.count_redacted({"key": 2}, "body")
    assert (one.redacted, other.redacted) == ({("key", "body"): 3}, {})
