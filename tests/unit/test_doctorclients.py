"""What clients say, and what it means."""

from __future__ import annotations

import sys

import pytest

from proxy.doctorclients import CLIENTS, Client, judge, try_clients

CLIENT = Client("curl", ("curl",), "set HTTPS_PROXY", "set CURL_CA_BUNDLE", untried="no such thing")


@pytest.mark.parametrize(
    "said",
    [
        "HTTP/1.1 403 Forbidden\r\nsallyport-decision: block; reason=no_rule",
        "fatal: unable to access 'https://x/': The requested URL returned error: 403",
        "npm error code E403",
        "502 allow; reason=upstream_unreachable",
    ],
)
def test_any_answer_for_a_host_that_cannot_exist_is_the_proxys(said: str) -> None:
    assert judge(CLIENT, said).ok


@pytest.mark.parametrize(
    "said",
    [
        "curl: (60) SSL certificate problem: unable to get local issuer certificate",
        "Error: self-signed certificate in certificate chain SELF_SIGNED_CERT_IN_CHAIN",
        "javax.net.ssl.SSLHandshakeException: PKIX path building failed",
        "tls: failed to verify certificate: x509: certificate signed by unknown authority",
    ],
)
def test_a_ca_that_is_not_trusted_has_its_own_fix(said: str) -> None:
    check = judge(CLIENT, said)
    assert (check.ok, check.fix) == (False, "set CURL_CA_BUNDLE")


def test_a_token_that_is_not_sent_is_told_apart() -> None:
    check = judge(CLIENT, "Received HTTP code 407 from proxy after CONNECT")
    assert check.ok is False
    assert "token" in check.fix


def test_who_does_not_reach_the_proxy_is_told_how() -> None:
    check = judge(CLIENT, "note\ncurl: (6) Could not resolve host\nbye")
    assert (check.ok, check.fix) == (False, "set HTTPS_PROXY")
    assert check.detail.endswith("curl: (6) Could not resolve host")
    assert judge(CLIENT, "").ok is False


def test_what_cannot_be_tried_is_neither_good_nor_bad() -> None:
    assert judge(CLIENT, "no such thing here").ok is None


def test_a_client_that_is_not_installed_is_left_out() -> None:
    there = Client("there", (sys.executable, "-c", "print('403', open('made').read())"), "", "", {"made": "by us"})
    missing = Client("missing", ("no-such-client",), "", "")
    assert [check.name for check in try_clients({"PATH": "/nowhere"}, [there, missing])] == ["there"]


def test_every_client_has_a_fix_for_both() -> None:
    assert all(client.proxy and client.ca for client in CLIENTS)
    assert len({client.name for client in CLIENTS}) == len(CLIENTS)
