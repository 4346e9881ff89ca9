"""Every refusal there is: its stable code, its HTTP status and its words. Nothing that decides lives here."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a request was allowed or refused; the value is the public code."""

    ALLOWED = "allowed"
    NO_RULE = "no_rule"
    BLOCKED = "blocked"
    NO_IDENTITY = "no_identity"
    BAD_IDENTITY = "bad_identity"
    IDENTITY_CONFLICT = "identity_conflict"
    AGENT_KILLED = "agent_killed"
    PRIVATE_ADDRESS = "private_address"
    PROTOCOL_NOT_ALLOWED = "protocol_not_allowed"
    CREDENTIAL_SCOPE = "credential_scope"
    SECRET_LEAK = "secret_leak"
    AUTHORITY_MISMATCH = "authority_mismatch"
    AMBIGUOUS_REQUEST = "ambiguous_request"
    CLIENT_TLS = "client_tls"
    LIMIT_EXCEEDED = "limit_exceeded"
    BODY_TOO_LARGE = "body_too_large"
    CREDENTIAL_UNAVAILABLE = "credential_unavailable"
    POLICY_UNAVAILABLE = "policy_unavailable"
    STORE_UNAVAILABLE = "store_unavailable"
    AUDIT_UNAVAILABLE = "audit_unavailable"
    UPSTREAM_UNREACHABLE = "upstream_unreachable"
    UPSTREAM_TLS = "upstream_tls"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    INTERNAL = "internal"

    @property
    def status(self) -> int:
        """The HTTP status a refusal for this reason is answered with."""
        return _WORDS[self][0]

    @property
    def message(self) -> str:
        """A sentence for the agent, with the fields {agent}, {method}, {target} and {detail}."""
        return _WORDS[self][1]

    @property
    def hint(self) -> str:
        """What the agent can do about it."""
        return _WORDS[self][2]


_ASK = "Ask your operator to allow this; retrying will not help."
_LATER = "Nothing is wrong with your request; try again later."
_OPERATOR = "Tell your operator; retrying will not help."

_WORDS: dict[Reason, tuple[int, str, str]] = {
    Reason.ALLOWED: (200, "Allowed.", ""),
    Reason.NO_RULE: (403, "No rule allows {agent} to {method} {target}.", _ASK),
    Reason.BLOCKED: (403, "A rule forbids {agent} to {method} {target}.", "Do not try this again."),
    Reason.NO_IDENTITY: (
        407,
        "The proxy does not know who is asking.",
        "Send the agent's token in Proxy-Authorization (Basic agent:token or Bearer token).",
    ),
    Reason.BAD_IDENTITY: (407, "The proof of identity is not valid.", "Ask your operator for a new token."),
    Reason.IDENTITY_CONFLICT: (407, "The proofs of identity name different agents.", "Send one agent's proof only."),
    Reason.AGENT_KILLED: (403, "{agent} was stopped by its operator.", "Stop; retrying will not help."),
    Reason.PRIVATE_ADDRESS: (403, "{target} leads to an address that is not public.", _ASK),
    Reason.PROTOCOL_NOT_ALLOWED: (403, "{detail}", _ASK),
    Reason.CREDENTIAL_SCOPE: (403, "The credential for {target} may not be used for this request.", _ASK),
    Reason.SECRET_LEAK: (403, "{detail}", "Do not send secrets; credentials are added for you."),
    Reason.AUTHORITY_MISMATCH: (
        421,
        "The connection, the TLS server name and the Host header name different hosts.",
        "Send the request on a connection of its own host.",
    ),
    Reason.AMBIGUOUS_REQUEST: (400, "The request can be read in more than one way: {detail}.", "Send it well-formed."),
    Reason.CLIENT_TLS: (  # for the record: without TLS nothing can be answered
        400,
        "The TLS handshake between {agent} and the proxy failed.",
        "Make the client trust the proxy's CA; `sallyport agent env` prints the variables.",
    ),
    Reason.LIMIT_EXCEEDED: (
        429,
        "{agent} has used up a limit for {target}{detail}.",
        "Ask for less, and wait as long as retry-after says.",
    ),
    Reason.BODY_TOO_LARGE: (413, "The request body is larger than a rule for {target} takes.", _ASK),
    Reason.CREDENTIAL_UNAVAILABLE: (503, "The credential for {target} is not available now.", _OPERATOR),
    Reason.POLICY_UNAVAILABLE: (503, "The proxy has no rules to decide by.", _OPERATOR),
    Reason.STORE_UNAVAILABLE: (503, "The proxy cannot reach its store.", _LATER),
    Reason.AUDIT_UNAVAILABLE: (503, "The proxy cannot put requests on record now, so it sends none.", _LATER),
    Reason.UPSTREAM_UNREACHABLE: (502, "{target} could not be reached.", "Check the host name; try again later."),
    Reason.UPSTREAM_TLS: (502, "{target} showed no certificate the proxy trusts.", _OPERATOR),
    Reason.UPSTREAM_TIMEOUT: (504, "{target} did not answer in time.", _LATER),
    Reason.INTERNAL: (500, "The proxy failed on this request and refused it.", _OPERATOR),
}
