"""What an operator may write about a credential: its name, kind, fields and secret. Nothing is kept or sealed here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping

from proxy.forms import MIN_REDACTABLE
from proxy.problem import UserError
from proxy.secret import Secret

MAX_SECRET = 64 << 10  # bytes: no server takes more in a header, and it is searched for in every answer
KINDS: Mapping[str, tuple[str, ...]] = {  # kind -> the fields it may have
    "static": (),
    "bearer": (),
    "basic": ("username",),
    "header": ("name", "value"),
    "query": ("name",),
    "cookie": ("name",),
    "placeholder": ("placeholder",),
    "sigv4": ("service", "region"),
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_AWS_KEY = re.compile(rb"[A-Za-z0-9_]{4,128}:[A-Za-z0-9+/=_.-]{8,}(?::[A-Za-z0-9+/=_.-]+)?")
_AWS_WORD = re.compile(r"[a-z0-9][a-z0-9-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def parse_name(text: str) -> str:
    """`text`, if it can be a credential's name. Raises UserError."""
    if not _NAME.fullmatch(text):
        raise UserError(
            f"{text!r} cannot be a credential name: use 1 to 63 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return text


def check_kind(kind: str, fields: Mapping[str, str]) -> None:
    """Raises UserError unless `kind` exists and takes these `fields` with these values."""
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}{_meant(kind, KINDS)}: use one of {', '.join(KINDS)}")
    for field, value in fields.items():
        if field not in KINDS[kind]:
            valid = ", ".join(KINDS[kind]) or "no fields"
            raise UserError(f"kind {kind} has no field {field!r}{_meant(field, KINDS[kind])}: it takes {valid}")
        if not value or _CONTROL.search(value):
            raise UserError(f"field {field} of kind {kind} must be non-empty text without control characters")
        wrong = _WRONG.get((kind, field), _nothing)(value)
        if wrong:
            raise UserError(f"field {field} of kind {kind} {wrong}")


def check_secret(secret: Secret, kind: str) -> None:
    """Raises UserError unless `secret` is 1 byte to 64 KiB and can be injected as `kind` says. Never quotes it."""
    value = secret.reveal()
    if not value:
        raise UserError("the secret is empty: write it to standard input, or use --from-env or --from-file")
    if len(value) > MAX_SECRET:
        raise UserError(f"the secret has {len(value)} bytes, more than 64 KiB: check that it is the right file")
    if kind != "placeholder" and any(byte in value for byte in (b"\r", b"\n", b"\0")):
        # CR, LF and NUL would end the field they are injected into (RFC 9110 section 5.5).
        raise UserError(
            f"the secret has a line break or NUL inside, which kind {kind} cannot carry: "
            "give a single line, or use --kind placeholder"
        )
    if kind == "sigv4" and not is_aws_key(value):
        raise UserError("the secret of kind sigv4 is ACCESS_KEY_ID:SECRET_ACCESS_KEY, or that and :SESSION_TOKEN")


def is_aws_key(secret: bytes) -> bool:
    """Whether a secret is `ACCESS_KEY_ID:SECRET_ACCESS_KEY`, with `:SESSION_TOKEN` where there is one."""
    return _AWS_KEY.fullmatch(secret) is not None


def clean_secret(data: bytes, kind: str) -> tuple[Secret, list[str]]:
    """The secret in `data` as it was read, less one newline at the end, and notes for the user on what was done.

    Raises UserError as `check_secret` does.
    """
    notes = []
    for newline in (b"\r\n", b"\n"):
        if data.endswith(newline):
            data = data.removesuffix(newline)
            notes.append("one newline at the end of the secret was left out")
            break
    secret = Secret(data)
    check_secret(secret, kind)
    if len(data) < MIN_REDACTABLE:
        notes.append(f"a secret of less than {MIN_REDACTABLE} bytes is not redacted when an upstream sends it back")
    return secret, notes


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _nothing(_: str) -> str:
    return ""


def _not_a_token(value: str) -> str:
    return "" if _TOKEN.fullmatch(value) else f"is {value!r}, which has characters a name cannot have"


def no_aws_word(value: str) -> str:
    """What is wrong with the name of a service or region; an empty text if nothing."""
    return "" if _AWS_WORD.fullmatch(value) else f"is {value!r}: write it as AWS does, such as s3 or eu-central-1"


_WRONG: Mapping[tuple[str, str], Callable[[str], str]] = {
    ("header", "name"): _not_a_token,
    ("cookie", "name"): _not_a_token,
    ("header", "value"): lambda value: "" if "{secret}" in value else "must contain {secret}, where the secret goes",
    ("sigv4", "service"): no_aws_word,
    ("sigv4", "region"): no_aws_word,
    # A colon would end the user name early (RFC 7617 section 2).
    ("basic", "username"): lambda value: "must not contain a colon" if ":" in value else "",
}
