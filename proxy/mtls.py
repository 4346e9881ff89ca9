"""Whose a client's certificate is. TLS has verified its chain; the name and the expiry are looked at here, because a
resumed session is not verified again (RFC 8446 section 2.2)."""

from __future__ import annotations

from cryptography import x509
from cryptography.x509.oid import NameOID

from proxy.proof import AgentPattern, Proof
from proxy.settings import Mtls

NAME = "mtls"


class ClientCertificates:
    """Reads agents' names in certificates, as `identity.mtls` says where they stand."""

    def __init__(self, settings: Mtls) -> None:
        self._uri = settings.uri
        self._common_name = settings.agent == "cn"

    def proof(self, der: bytes) -> Proof:
        """What a verified certificate proves; one that names no agent proves nothing, which is not the same as none."""
        try:
            certificate = x509.load_der_x509_certificate(der)
            agent = _common_name(certificate) if self._common_name else self._spiffe(certificate)
        except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
            return Proof(NAME, "")
        return Proof(NAME, agent, certificate.not_valid_after_utc.timestamp())

    def _spiffe(self, certificate: x509.Certificate) -> str:
        """By its one URI (SPIFFE X509-SVID section 2: exactly one)."""
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        if len(uris) != 1:
            return ""
        return (self._uri or _last_segment(uris[0])).agent(uris[0]) or ""


def _last_segment(uri: str) -> AgentPattern:
    return AgentPattern(uri[: uri.rfind("/") + 1], "")


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return AgentPattern("", "").agent(str(names[0].value)) or "" if len(names) == 1 else ""
