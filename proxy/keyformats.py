"""Keys and tokens known by their form, for rules that say `scan: secrets`. Each was written from its maker's own words.

Where a format carries a checksum, text that only looks like it is passed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from proxy.agenttoken import token_digest
from proxy.leak import Detector, Finding, Shape

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_WORD = r"[0-9A-Za-z_-]*"
_PEM = rb"-----BEGIN "


def checksum(random: bytes) -> bytes:
    """The last 6 characters of a token of GitHub or npm: CRC-32 of the 30 random ones before it, in base62.

    Source: GitHub's and npm's announcements of these formats (April and September 2021).
    """
    number, digits = zlib.crc32(random), ""
    while number:
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return digits.rjust(6, "0").encode()


def _checked(name: str, prefix: int) -> Callable[[bytes], Finding | None]:
    return lambda text: Finding("key", name) if checksum(text[prefix:-6]) == text[-6:] else None


def _is(name: str) -> Callable[[bytes], Finding | None]:
    finding = Finding("key", name)
    return lambda _: finding


def _own(text: bytes) -> Finding | None:
    return Finding("key", "sallyport") if token_digest(text.decode("latin-1")) else None


FORMATS = (
    Shape("gh[oprsu]_[0-9A-Za-z]{36}", (b"gho_", b"ghp_", b"ghr_", b"ghs_", b"ghu_"), _WORD, _checked("github", 4)),
    Shape("github_pat_[0-9A-Za-z]{22}_[0-9A-Za-z]{59}", (b"github_pat_",), _WORD, _is("github")),
    Shape("npm_[0-9A-Za-z]{36}", (b"npm_",), _WORD, _checked("npm", 4)),
    Shape("slp_[0-9A-Za-z]{43}_[0-9a-f]{8}", (b"slp_",), _WORD, _own),
    Shape(r"\b(?:AKIA|ASIA)[2-7A-Z]{16}\b", (b"AKIA", b"ASIA"), "[2-7A-Z]*", _is("aws")),
    Shape("AIza[0-9A-Za-z_-]{35}", (b"AIza",), _WORD, _is("google")),
    Shape("sk-ant-[a-z]{3,8}[0-9]{2}-[0-9A-Za-z_-]{80,120}", (b"sk-ant-",), _WORD, _is("anthropic")),
    Shape("sk-(?:[a-z]{2,10}-)?[0-9A-Za-z_-]{20,100}T3BlbkFJ[0-9A-Za-z_-]{20,100}", (b"sk-",), _WORD, _is("openai")),
    Shape("glpat-[0-9A-Za-z_-]{20}", (b"glpat-",), _WORD, _is("gitlab")),
    Shape("hf_[A-Za-z]{34}", (b"hf_",), "[A-Za-z]*", _is("huggingface")),
    Shape("xox[abeoprs]-[0-9A-Za-z-]{20,200}", (b"xox",), "[0-9A-Za-z-]*", _is("slack")),
    Shape("[rs]k_live_[0-9A-Za-z]{20,200}", (b"rk_live_", b"sk_live_"), "[0-9A-Za-z]*", _is("stripe")),
    Shape(r"SG\.[0-9A-Za-z_-]{22}\.[0-9A-Za-z_-]{43}", (b"SG.",), r"[0-9A-Za-z_.-]*", _is("sendgrid")),
    Shape("pypi-AgEIcHlwaS5vcmc[0-9A-Za-z_-]{50,170}", (b"pypi-",), _WORD, _is("pypi")),
    Shape("do[oprst]_v1_[0-9a-f]{64}", (b"doo_v1_", b"dop_v1_", b"dor_v1_"), "[0-9a-f]*", _is("digitalocean")),
    Shape("hv[bs][.][0-9A-Za-z_-]{90,120}", (b"hvb.", b"hvs."), _WORD, _is("vault")),
    Shape("-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY", (_PEM,), "[A-Z0-9 ]*", _is("private-key")),
)
DETECTOR = Detector({}, FORMATS)
