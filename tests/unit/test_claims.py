"""A signed token is taken apart strictly, and says in one way who acts."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from proxy.claims import MAX_TOKEN, Unsigned, claim, number, split, subject
from proxy.proof import Told


def encoded(data: object) -> str:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def token(header: object = None, claims: object = None, signature: bytes = b"sig") -> str:
    return ".".join(
        (encoded({"alg": "HS256"} if header is None else header), encoded(claims or {}), encoded(signature))
    )


def test_a_token_has_three_parts() -> None:
    text = token({"alg": "HS256", "kid": "one"}, {"sub": "coder-1"})
    parts = split(text)
    assert (parts.header["kid"], parts.claims, parts.signature) == ("one", {"sub": "coder-1"}, b"sig")
    assert parts.signed.decode() == text.rpartition(".")[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.b",
        "a.b.c",
        "slp_abc",
        token() + ".x",
        token() + "=",
        token().replace(".", " ."),
        token(["alg"]),
        token(b"{"),
        token(b"\xff"),
        token(b"[" * 100_000),
        token({"alg": "HS256", "crit": ["exp"]}),
        token(claims=b'{"sub": "coder-1", "sub": "coder-2"}'),
        token(claims={"x": "y" * MAX_TOKEN}),
        encoded({}) + "." + encoded({}) + ".AB",
    ],
)
def test_anything_else_is_no_token(text: str) -> None:
    with pytest.raises(Unsigned):
        split(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(5, 5.0), (5.5, 5.5), (True, None), ("5", None), (float("nan"), None), (float("inf"), None), (10**400, None)],
)
def test_a_date_is_a_finite_number(value: Any, expected: float | None) -> None:
    assert number({"exp": value}, "exp") == expected
    assert number({}, "exp") is None


def test_a_claim_is_found_by_name_or_pointer() -> None:
    claims = {"sub": "a", "kubernetes.io": {"pod": {"name": "p"}}, "a/b": {"~": "t"}, "list": [1]}
    assert claim(claims, "sub") == "a"
    assert claim(claims, "/kubernetes.io/pod/name") == "p"
    assert claim(claims, "/a~1b/~0") == "t"
    assert claim(claims, "/list/0") is None
    assert claim(claims, "kubernetes.io/pod") is None


def test_the_actor_is_the_agent() -> None:
    """RFC 8693 section 4.1."""
    assert subject({"sub": "coder-1"}) == ("coder-1", None)
    assert subject({"sub": "ada", "act": {"sub": "coder-1"}}) == ("coder-1", Told(on_behalf_of="ada"))
    assert subject({"sub": "ada", "act": {"sub": "coder-1", "act": {"sub": "older"}}})[0] == "coder-1"


@pytest.mark.parametrize(
    "claims", [{}, {"sub": 5}, {"sub": "a", "act": "b"}, {"sub": "a", "act": {}}, {"act": {"sub": "b"}}]
)
def test_what_does_not_say_it_names_nobody(claims: dict[str, Any]) -> None:
    assert subject(claims)[0] == ""
