"""Tokens are made and recognised exactly."""

from __future__ import annotations

import hashlib
import os
import re

import pytest

from proxy.agenttoken import make_token, token_digest


def test_a_token_has_its_public_form() -> None:
    assert re.fullmatch(r"slp_[0-9A-Za-z]{43}_[0-9a-f]{8}", make_token(os.urandom))


def test_a_token_is_known_by_its_sha256() -> None:
    token = make_token(os.urandom)
    assert token_digest(token) == hashlib.sha256(token.encode()).hexdigest()


def test_bytes_that_would_favour_some_characters_are_drawn_again() -> None:
    """256 is no multiple of 62: of 248 to 255 eight characters would get one chance more."""
    draws = iter([bytes(range(248, 256)) * 6, bytes(range(43))])
    assert make_token(lambda size: next(draws)[:size])[4:47] == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefg"


@pytest.mark.parametrize("at", [0, 4, 20, 46, 47, 48, 55])
def test_a_typing_mistake_is_no_token(at: int) -> None:
    token = make_token(os.urandom)
    other = "0" if token[at] != "0" else "1"
    assert token_digest(token[:at] + other + token[at + 1 :]) is None


@pytest.mark.parametrize("text", ["", "slp_", "slp__00000000", "ä" * 56, "slp_" + "a" * 43 + "_0000000g"])
def test_other_text_is_no_token(text: str) -> None:
    assert token_digest(text) is None


def test_a_newline_behind_a_token_is_no_token() -> None:
    assert token_digest(make_token(os.urandom) + "\n") is None
