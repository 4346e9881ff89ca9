"""The codes, statuses and words of every refusal are public: dashboards and agents rely on them."""

from __future__ import annotations

import string

import pytest

from proxy.reason import Reason

STATUSES = {
    "allowed": 200,
    "no_rule": 403,
    "blocked": 403,
    "no_identity": 407,
    "bad_identity": 407,
    "identity_conflict": 407,
    "agent_killed": 403,
    "private_address": 403,
    "protocol_not_allowed": 403,
    "credential_scope": 403,
    "secret_leak": 403,
    "authority_mismatch": 421,
    "ambiguous_request": 400,
    "client_tls": 400,
    "limit_exceeded": 429,
    "body_too_large": 413,
    "credential_unavailable": 503,
    "policy_unavailable": 503,
    "store_unavailable": 503,
    "audit_unavailable": 503,
    "upstream_unreachable": 502,
    "upstream_tls": 502,
    "upstream_timeout": 504,
    "internal": 500,
}


def test_codes_and_statuses_are_the_public_ones() -> None:
    assert {reason.value: reason.status for reason in Reason} == STATUSES


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_sentence_and_says_what_to_do(reason: Reason) -> None:
    fields = {name for _, name, _, _ in string.Formatter().parse(reason.message) if name}
    assert fields <= {"agent", "method", "target", "detail"}
    assert reason.message[-1] in ".}"
    assert reason.hint or reason is Reason.ALLOWED
