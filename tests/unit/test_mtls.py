"""Whose a certificate is: by its one SPIFFE ID or its one common name, until it expires."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from proxy.mtls import ClientCertificates
from proxy.proof import AgentPattern
from proxy.settings import Mtls

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
END = START + datetime.timedelta(hours=1)


def certificate(uris: list[str] | None = None, names: list[str] | None = None) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names or []])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CA")]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(START)
        .not_valid_after(END)
    )
    if uris is not None:
        alternatives = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName([*alternatives, x509.DNSName("x.test")]), False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def by(agent: str = "san-uri", uri: str | None = None) -> ClientCertificates:
    pattern = AgentPattern.parse(uri) if uri else None
    return ClientCertificates(Mtls.model_construct(agent=agent, uri=pattern))


def test_a_spiffe_id_names_its_agent_until_the_certificate_ends() -> None:
    proof = by().proof(certificate(["spiffe://example.org/agent/coder-1"], ["somebody"]))
    assert (proof.name, proof.agent, proof.expires) == ("mtls", "coder-1", END.timestamp())


@pytest.mark.parametrize(
    "uris",
    [
        None,
        [],
        ["spiffe://example.org/agent/a", "spiffe://example.org/agent/b"],
        ["spiffe://example.org/agent/"],
        ["spiffe://example.org/agent/a?b"],
        ["spiffe://example.org/agent/a%2fb"],
    ],
)
def test_without_exactly_one_it_names_nobody(uris: list[str] | None) -> None:
    assert by().proof(certificate(uris, ["coder-1"])).agent == ""


@pytest.mark.parametrize("uri", ["spiffe://evil.org/agent/coder-1", "spiffe://example.org/x/agent/coder-1"])
def test_a_pattern_narrows_what_is_taken(uri: str) -> None:
    narrow = by(uri="spiffe://example.org/agent/{agent}")
    assert narrow.proof(certificate(["spiffe://example.org/agent/coder-1"])).agent == "coder-1"
    assert narrow.proof(certificate([uri])).agent == ""


@pytest.mark.parametrize(("names", "agent"), [(["coder-1"], "coder-1"), (["a", "b"], ""), ([], ""), (["a b"], "")])
def test_a_common_name_names_its_agent(names: list[str], agent: str) -> None:
    assert by("cn").proof(certificate(["spiffe://example.org/x"], names)).agent == agent


def test_what_is_no_certificate_proves_nothing() -> None:
    proof = by().proof(b"\x30\x00")
    assert (proof.agent, proof.expires) == ("", float("inf"))
