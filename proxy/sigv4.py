"""AWS Signature Version 4: from a request as it is sent to the signature in its Authorization header. Pure.

Source: "Create a signed AWS API request", AWS Identity and Access Management User Guide.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote_plus, unquote_to_bytes

ALGORITHM = "AWS4-HMAC-SHA256"
UNSIGNED = "UNSIGNED-PAYLOAD"
STREAMING_UNSIGNED = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"  # chunks without signatures, which need no key
# What takes UNSIGNED-PAYLOAD, and whose paths are encoded once: a key is not normalised.
OBJECT_STORES = frozenset({"s3", "s3-object-lambda", "s3-outposts"})
_SAFE = "-_.~"
_OF_A_SIGNATURE = frozenset({b"authorization", b"x-amz-date", b"x-amz-security-token", b"x-amz-content-sha256"})
_SIGNED_BESIDE = frozenset({"content-md5", "content-type"})
_PRESIGNED = frozenset(
    f"x-amz-{name}"
    for name in ("algorithm", "credential", "date", "expires", "security-token", "signature", "signedheaders")
)
_PRESIGNED_2 = frozenset({"awsaccesskeyid", "expires", "signature"})


@dataclass(frozen=True, slots=True)
class Scope:
    """Where and when a signature counts; `stamp` is UTC as `20150830T123600Z`."""

    service: str
    region: str
    stamp: str

    def __str__(self) -> str:
        return f"{self.stamp[:8]}/{self.region}/{self.service}/aws4_request"


def is_of_signature(name: bytes) -> bool:
    """Whether a header is part of a signature, the agent's own."""
    return name.lower().replace(b"_", b"-") in _OF_A_SIGNATURE


def sent_path(path: str) -> str:
    """`path` with each octet escaped that AWS escapes, so that whether it decodes it first makes no difference."""
    return "/".join(quote(unquote_to_bytes(segment), safe=_SAFE) for segment in path.split("/"))


def sent_query(query: str) -> str:
    """`query` without the parameters of a presigned URL, in AWS's escapes; a plus is a blank, as rules read it."""
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    names = {unquote_plus(name).lower() for name, _, _ in pairs}
    dropped = _PRESIGNED | (_PRESIGNED_2 if "awsaccesskeyid" in names else frozenset())
    kept = [pair for pair in pairs if unquote_plus(pair[0]).lower() not in dropped]
    return "&".join(_escaped(name) + equals + _escaped(value) for name, equals, value in kept)


def _escaped(text: str) -> str:
    return quote(unquote_to_bytes(text.replace("+", " ")), safe=_SAFE)


def hash_of(payload: bytes) -> str:
    """What x-amz-content-sha256 says of a body."""
    return hashlib.sha256(payload).hexdigest()


def canonical_request(
    method: str, path: str, query: str, headers: Mapping[str, str], payload: str, *, encode_again: bool
) -> str:
    """The request as it is signed: `path` and `query` as they are sent, `headers` by name in lower case."""
    pairs = sorted((name, value) for name, _, value in (pair.partition("=") for pair in query.split("&") if pair))
    lines = [f"{name}:{headers[name]}" for name in sorted(headers)]
    return "\n".join(
        (
            method,
            quote(path, safe=f"/{_SAFE}") if encode_again else path,
            "&".join(f"{name}={value}" for name, value in pairs),
            *lines,
            "",
            ";".join(sorted(headers)),
            payload,
        )
    )


def signed_headers(fields: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers that are signed, by name, as AWS reads them: several values joined, blanks folded."""
    found: dict[str, list[str]] = {}
    for name, value in fields:
        key = name.decode("latin-1").lower()
        if key == "host" or key in _SIGNED_BESIDE or key.startswith("x-amz-"):
            found.setdefault(key, []).append(re.sub(" +", " ", value.decode("latin-1").strip()))
    return {name: ",".join(values) for name, values in found.items()}


def signature(canonical: str, scope: Scope, secret_key: bytes) -> str:
    """The signature of a canonical request, in hexadecimal."""
    text = "\n".join((ALGORITHM, scope.stamp, str(scope), hash_of(canonical.encode("latin-1"))))
    key = b"AWS4" + secret_key
    for part in (scope.stamp[:8], scope.region, scope.service, "aws4_request"):
        key = _hmac(key, part)
    return _hmac(key, text).hex()


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode("latin-1"), hashlib.sha256).digest()


def authorization(access_key: str, scope: Scope, names: Iterable[str], sign: str) -> str:
    """The value of the header."""
    return f"{ALGORITHM} Credential={access_key}/{scope}, SignedHeaders={';'.join(sorted(names))}, Signature={sign}"
