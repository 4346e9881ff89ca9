"""Tokens of an identity provider: verified by its keys, for this proxy, in time, and whom they name."""

from __future__ import annotations

from typing import Any

import jwt

from proxy.agent import is_agent_id
from proxy.claims import Unsigned, claim, number, split, subject
from proxy.jwks import KeySet
from proxy.proof import Proof, Told, plain
from proxy.settings import Jwt

NAME = "jwt"
VERIFIED = 4096  # tokens whose signature was checked, remembered
_DELEGATED = "/act/sub"  # RFC 8693 section 4.1


class JwtIssuer:
    """What `identity.jwt` accepts."""

    def __init__(self, settings: Jwt, keys: KeySet) -> None:
        self._settings = settings
        self._keys = keys
        self._verified: dict[str, Proof] = {}
        keys.on_change = self._verified.clear

    def __bool__(self) -> bool:
        return True

    def verify(self, token: str, now: float) -> Proof | None:
        """What a token proves at `now` (Unix seconds); None: nothing."""
        proof = self._verified.get(token)
        if proof is None:
            claims = self._claims(token)
            proof = self._proof(claims) if claims else None
            if proof is None:
                return None
            if len(self._verified) >= VERIFIED:
                self._verified.clear()
            self._verified[token] = proof
        return proof if now < proof.expires else None

    def _claims(self, token: str) -> dict[str, Any] | None:
        settings = self._settings
        try:
            parts = split(token)
            kid, algorithm = parts.header.get("kid"), parts.header.get("alg")
            if algorithm not in settings.algorithms or not (kid is None or isinstance(kid, str)):
                return None
            key = self._keys.key(kid, algorithm)
            if key is None:
                return None
            jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.skew,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (Unsigned, jwt.PyJWTError, ValueError, TypeError, OverflowError):
            return None
        return parts.claims

    def _proof(self, claims: dict[str, Any]) -> Proof | None:
        settings, expires = self._settings, number(claims, "exp")
        if settings.agent_claim == "sub":
            text, told = subject(claims)
            user = told.on_behalf_of if told else ""
        else:
            text = claim(claims, settings.agent_claim)
            user = plain(claims.get("sub")) if settings.agent_claim == _DELEGATED else ""
        if settings.on_behalf_of:
            user = plain(claim(claims, settings.on_behalf_of))
        agent = settings.agent.agent(text) if settings.agent and isinstance(text, str) else text
        if expires is None or not isinstance(agent, str) or not is_agent_id(agent):
            return None
        labels = {label: value for label, name in settings.labels.items() if (value := plain(claim(claims, name)))}
        return Proof(NAME, agent, expires + settings.skew, Told(labels, user) if labels or user else None)
