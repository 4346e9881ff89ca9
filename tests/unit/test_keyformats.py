"""Keys are known by their form, and by their checksum where they have one."""

from __future__ import annotations

from functools import reduce

import pytest

from proxy.agenttoken import make_token
from proxy.keyformats import _BASE62, DETECTOR, checksum

RANDOM = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5"
CHECKED = RANDOM + checksum(RANDOM.encode()).decode()
KEYS = [  # put together, so that no scanner takes this file for a leak
    ("github", "ghp_" + CHECKED),
    ("github", "ghs_" + CHECKED),
    ("github", "github_pat_" + "1" * 22 + "_" + "a" * 59),
    ("npm", "npm_" + CHECKED),
    ("sallyport", make_token(lambda size: bytes(range(size)))),
    ("aws", "ASIA" + "Q3EGTZ5LMNOPRSXY"),
    ("google", "AIza" + "x" * 35),
    ("anthropic", "sk-ant-" + "api03-" + "x" * 95),
    ("openai", "sk-" + "x" * 20 + "T3BlbkFJ" + "x" * 20),
    ("openai", "sk-proj-" + "x" * 74 + "T3BlbkFJ" + "x" * 74),
    ("gitlab", "glpat-" + "x" * 20),
    ("huggingface", "hf_" + "x" * 34),
    ("slack", "xoxb-" + "1" * 12 + "-" + "2" * 12 + "-" + "x" * 24),
    ("stripe", "sk_live_" + "x" * 24),
    ("sendgrid", "SG." + "x" * 22 + "." + "y" * 43),
    ("pypi", "pypi-" + "AgEIcHlwaS5vcmc" + "x" * 80),
    ("digitalocean", "dop_v1_" + "a" * 64),
    ("vault", "hvs." + "x" * 95),
    ("private-key", "-----BEGIN " + "PRIVATE KEY-----"),
    ("private-key", "-----BEGIN OPENSSH " + "PRIVATE KEY-----"),
]


def names(text: str) -> list[str]:
    return [finding.name for _, finding in DETECTOR.find(text.encode())]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_a_key_is_known_wherever_it_stands(name: str, key: str) -> None:
    assert names(f'{{"key":"{key}"}}') == [name]
    assert names(f"KEY={key}\n") == [name]


@pytest.mark.parametrize(
    "text",
    [
        "ghp_" + CHECKED[:-1] + ("0" if CHECKED[-1] != "0" else "1"),
        "npm_" + "x" * 36,
        "slp_" + "x" * 43 + "_00000000",
        "slp_placeholder_github",
        "AKIA" + "Q3EGTZ5LMNOPRSX",
        "XAKIA" + "Q3EGTZ5LMNOPRSXY",
        "-----BEGIN CERTIFICATE-----",
        "-----BEGIN PUBLIC KEY-----",
        "sk-learn and task-oriented-planning-for-everybody-who-wants-it",
        "ghp_short",
    ],
)
def test_what_only_looks_alike_is_none(text: str) -> None:
    assert names(text) == []


def test_the_checksum_is_crc_32_in_base62() -> None:
    assert checksum(b"") == b"000000"
    digits = [_BASE62.index(chr(char)) for char in checksum(b"123456789")]
    assert reduce(lambda number, digit: number * 62 + digit, digits) == 0xCBF43926  # the check value of CRC-32


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_the_beginning_of_a_key_is_held_until_more_is_known(name: str, key: str) -> None:
    text = b"x " + key.encode()
    if len(text) < 250:
        assert DETECTOR.undecided(text[:-7]) == 2
