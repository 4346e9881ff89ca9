"""Tokens of an identity provider: only its keys, for this proxy, in time, and in one reading."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from proxy.jwks import SPACING, STALE, KeySet
from proxy.jwtidentity import VERIFIED, JwtIssuer
from proxy.proof import AgentPattern, Told
from proxy.settings import Jwt

RSA, OTHER_RSA = (rsa.generate_private_key(65537, 2048) for _ in range(2))
EC = ec.generate_private_key(ec.SECP256R1())
ISSUER, AUDIENCE = "https://idp.test", "sallyport"


def jwks(**keys: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    sets = []
    for kid, key in keys.items():
        public = key.public_key()
        form: Any = RSAAlgorithm if isinstance(public, rsa.RSAPublicKey) else ECAlgorithm
        sets.append({**form.to_jwk(public, as_dict=True), "kid": kid, "use": "sig"})
    return json.dumps({"keys": sets})


def issuer(folder: Path, text: str | None = None, **settings: Any) -> JwtIssuer:
    file = folder / "jwks.json"
    file.write_text(text or jwks(r=RSA, e=EC))
    given = Jwt.model_validate({"jwks": str(file), "issuer": ISSUER, "audience": AUDIENCE, **settings})
    keys = KeySet(given)
    asyncio.run(keys.load())
    return JwtIssuer(given, keys)


def token(key: Any = RSA, algorithm: str = "RS256", kid: str | None = "r", **claims: Any) -> str:
    body = {"iss": ISSUER, "aud": AUDIENCE, "sub": "coder-1", "exp": int(time.time()) + 60, **claims}
    body = {name: value for name, value in body.items() if value is not None}
    return jwt.encode(body, key, algorithm, headers={"kid": kid} if kid else {})


def test_a_token_proves_its_subject(tmp_path: Path) -> None:
    found = issuer(tmp_path)
    for text in (token(), token(EC, "ES256", "e"), token(aud=["other", AUDIENCE])):
        for _ in range(2):  # the second time from memory
            proof = found.verify(text, time.time())
            assert proof
            assert (proof.name, proof.agent, proof.told) == ("jwt", "coder-1", None)
    assert found.verify(token(), time.time() + 120) is None


@pytest.mark.parametrize(
    "text",
    [
        token(OTHER_RSA),
        token(kid="unknown"),
        token(kid=None),
        token(EC, "ES256", "r"),
        token(RSA, "RS512"),
        token("x" * 64, "HS256"),
        jwt.encode({"sub": "coder-1"}, None, "none"),
        token(iss="https://evil.test"),
        token(iss=None),
        token(aud="other"),
        token(aud=None),
        token(exp=int(time.time()) - 60),
        token(exp=None),
        token(nbf=int(time.time()) + 600),
        token(sub="a b"),
        token(sub=None),
        token(sub="ada", act={"sub": ["x"]}),
        "slp_x",
        "",
    ],
)
def test_everything_else_proves_nothing(tmp_path: Path, text: str) -> None:
    assert issuer(tmp_path).verify(text, time.time()) is None


def test_a_public_key_is_no_shared_secret(tmp_path: Path) -> None:
    """Algorithm confusion: HMAC under the text of the public key (RFC 8725 section 2.1), and keys of kind oct."""
    both = json.loads(jwks(r=RSA))
    both["keys"].append({"kty": "oct", "k": "eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4", "kid": "o", "alg": "HS256"})
    found = issuer(tmp_path, json.dumps(both))
    assert found.verify(token("x" * 64, "HS256", "o"), time.time()) is None
    assert found.verify(token(kid=None), time.time())  # one key is left, so no name is needed


@pytest.mark.parametrize("algorithm", ["HS256", "none", "rs256"])
def test_only_public_algorithms_can_be_allowed(tmp_path: Path, algorithm: str) -> None:
    with pytest.raises(ValueError, match="algorithms"):
        issuer(tmp_path, algorithms=[algorithm])


def test_claims_become_labels_and_a_user(tmp_path: Path) -> None:
    """By name or JSON pointer; what is not plain text is left out."""
    found = issuer(tmp_path, labels={"team": "team", "pod": "/kubernetes.io/pod/name", "no": "groups"})
    claims = {
        "team": "web",
        "kubernetes.io": {"pod": {"name": "p-1"}},
        "groups": ["a"],
        "act": {"sub": "x"},
        "sub": "ada",
    }
    proof = found.verify(token(**claims), time.time())
    assert proof
    assert (proof.agent, proof.told) == ("x", Told({"team": "web", "pod": "p-1"}, "ada"))


def test_the_agent_may_stand_elsewhere_and_in_a_form(tmp_path: Path) -> None:
    form = "system:serviceaccount:sandboxes:{agent}"
    found = issuer(tmp_path, agent=form)
    proof = found.verify(token(sub=form.format(agent="coder-7")), time.time())
    assert proof
    assert proof.agent == "coder-7"
    assert found.verify(token(sub="system:serviceaccount:other:coder-7"), time.time()) is None
    by_client = issuer(tmp_path, agent_claim="azp", on_behalf_of="email")
    proof = by_client.verify(token(sub="ada", azp="coder-8", email="ada@x.test"), time.time())
    assert proof
    assert (proof.agent, proof.told) == ("coder-8", Told({}, "ada@x.test"))


def test_keys_are_renewed_and_old_ones_end(tmp_path: Path) -> None:
    """A changed file counts at the next look; tokens that were checked before are checked again."""
    file = tmp_path / "jwks.json"
    file.write_text(jwks(r=RSA))
    now = [0.0]
    settings = Jwt.model_validate({"jwks": str(file), "issuer": ISSUER, "audience": AUDIENCE})
    keys = KeySet(settings, lambda: now[0])
    found = JwtIssuer(settings, keys)
    assert found.verify(token(), time.time()) is None
    asyncio.run(keys.load())
    old, new = token(), token(OTHER_RSA, kid="new")
    assert found.verify(old, time.time())
    assert found.verify(new, time.time()) is None
    file.write_text(jwks(new=OTHER_RSA))
    asyncio.run(keys.load())
    assert found.verify(old, time.time()) is None
    assert found.verify(new, time.time())
    file.write_text("{")
    now[0] = STALE / 2
    asyncio.run(keys.load())
    assert keys.key("new", "RS256")
    now[0] = STALE * 2
    assert keys.key("new", "RS256") is None


def test_memory_of_tokens_is_bounded(tmp_path: Path) -> None:
    found = issuer(tmp_path)
    found._verified.update(dict.fromkeys(map(str, range(VERIFIED)), None))  # type: ignore[arg-type]
    assert found.verify(token(), time.time())
    assert len(found._verified) == 1


def test_the_form_of_an_agent_is_parsed_at_load() -> None:
    assert AgentPattern.parse("x:{agent}").agent("x:a") == "a"
    assert SPACING < STALE
