"""Envelope encryption of one credential version: pure, with randomness as an argument. No files, no store, no clock.

A fresh data key seals the secret and the master key's wrapping half seals the data key, both with AES-256-GCM
(NIST SP 800-38D). Nonces are 96 random bits (section 8.2.2); a data key is used once, and one master key may wrap
2^32 data keys (section 8.3). Both layers carry the whole record as associated data, so a record that was renamed,
renumbered or widened does not open.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from proxy.secret import Secret

type Random = Callable[[int], bytes]

FORMAT = "sp1"
_KEY = 32  # bytes: AES-256
_NONCE = 12  # bytes: 96 bits, SP 800-38D section 5.2.1.1
_HEX = re.compile(rb"[0-9A-Fa-f]{64}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{43}=?")
_SEALED = re.compile(rf"{FORMAT}\.([0-9a-f]{{12}})\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)


class SealBroken(Exception):
    """The text is not what was sealed under this key for this record; the message holds nothing secret."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a seal vouches for besides the secret; `fields` and `grant` must be JSON-able."""

    name: str
    version: int
    kind: str
    fields: Mapping[str, str]
    grant: Mapping[str, object]

    def associated(self, layer: str) -> bytes:
        """The associated data of one layer. JSON with sorted keys keeps every border between values.

        Raises ValueError or TypeError for what JSON cannot say (NaN, odd types).
        """
        parts = [FORMAT, layer, self.name, self.version, self.kind, dict(self.fields), dict(self.grant)]
        return json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


@dataclass(frozen=True, slots=True)
class Stored:
    """A record as the store keeps it. `record` is a claim until `sealed` opened; the times (Unix seconds) stay one."""

    record: Record
    sealed: str
    created: float
    rotated: float | None

    @staticmethod
    def parse(name: str, text: str) -> Stored:
        """What lies under `name`. Raises SealBroken for text of any other form."""
        try:
            data = json.loads(text)
            record = Record(name, data["version"], data["kind"], data["fields"], data["grant"])
            stored = Stored(record, data["sealed"], data["created"], data["rotated"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SealBroken("its record is damaged") from None
        shapes = (
            type(record.version) is int,
            isinstance(record.kind, str),
            isinstance(record.fields, dict),
            isinstance(record.grant, dict),
            isinstance(stored.sealed, str),
            isinstance(stored.created, int | float),
            isinstance(stored.rotated, int | float | None),
        )
        if not all(shapes):
            raise SealBroken("its record is damaged")
        return stored

    def text(self) -> str:
        """The same as `parse` reads it; the name is the store's own key."""
        data = {key: getattr(self.record, key) for key in ("version", "kind", "fields", "grant")}
        data |= {"sealed": self.sealed, "created": self.created, "rotated": self.rotated}
        return json.dumps(data, sort_keys=True)


class TokenKey:
    """The half of a master key that tokens follow from; all that is kept of a key after it was changed."""

    __slots__ = ("id", "key")

    def __init__(self, key_id: str, key: Secret) -> None:
        self.id = key_id
        self.key = key

    def source(self, name: str, nonce: str) -> Random:
        """The bytes a token is made of, so that it need not be kept anywhere to be told again."""
        counter = itertools.count()

        def source(size: int) -> bytes:
            use = json.dumps([name, nonce, next(counter)]).encode("ascii")
            return _derive(self.key.reveal(), use, size)

        return source


class MasterKey:
    """32 bytes that seal every data key. It cannot be printed or pickled; `id` is public and names it.

    `beside` are the other keys there are while it is changed, asked anew each time; `former` what is left of those
    before it.
    """

    __slots__ = ("_wrapping", "beside", "former", "id", "tokens")

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY:
            raise ValueError(f"a master key is {_KEY} bytes, not {len(key)}")
        self._wrapping = AESGCM(_derive(key, b"sallyport wrapping key", _KEY))
        self.id = _derive(key, b"sallyport key id", 6).hex()
        self.tokens = TokenKey(self.id, Secret(_derive(key, b"sallyport agent tokens", _KEY)))
        self.beside: Callable[[str | None], Iterable[MasterKey]] = lambda _: ()
        self.former: tuple[TokenKey, ...] = ()

    @classmethod
    def parse(cls, text: str | bytes) -> MasterKey:
        """The key written as 64 hex digits, as base64 (either alphabet) of 32 bytes, or as 32 raw bytes.

        Raises ValueError with the words for the user; they never quote the text.
        """
        raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        stripped = raw.strip()
        if _HEX.fullmatch(stripped):
            return cls(bytes.fromhex(stripped.decode()))
        if _BASE64.fullmatch(stripped):
            return cls(base64.b64decode(stripped[:43] + b"=", altchars=b"-_" if set(b"-_") & set(stripped) else None))
        for candidate in (raw, stripped):
            # 32 printable characters are a password or half a key in hex; random bytes look so once in 10^13.
            if len(candidate) == _KEY and not (candidate.isascii() and candidate.decode().isprintable()):
                return cls(candidate)
        raise ValueError(
            "a master key is 32 random bytes, as 64 hex digits or base64: make one with `openssl rand -hex 32`"
        )

    def __repr__(self) -> str:
        return f"MasterKey({self.id})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a MasterKey is not serialised")

    def find(self, key_id: str) -> MasterKey | None:
        """This key or the one beside it of that id."""
        if key_id == self.id:
            return self
        return next((key for key in self.beside(key_id) if key.id == key_id), None)

    def token_keys(self) -> Iterable[TokenKey]:
        """Whatever a token may have been made with, the likeliest first."""
        yield self.tokens
        yield from self.former
        yield from (key.tokens for key in self.beside(None) if key.id != self.id)

    def wrap(self, data_key: bytes, associated: bytes, nonce: bytes) -> bytes:
        """`data_key` sealed under this key, `nonce` in front."""
        return nonce + self._wrapping.encrypt(nonce, data_key, associated)

    def unwrap(self, wrapped: bytes, associated: bytes) -> bytes:
        """The data key again. Raises InvalidTag or ValueError."""
        return self._wrapping.decrypt(wrapped[:_NONCE], wrapped[_NONCE:], associated)


def seal(master: MasterKey, record: Record, secret: Secret, random: Random) -> str:
    """`format.key id.wrapped data key.sealed secret`; `random(n)` gives n bytes fit for keys."""
    data_key, nonce = random(_KEY), random(_NONCE)
    wrapped = master.wrap(data_key, record.associated("key"), random(_NONCE))
    sealed = nonce + AESGCM(data_key).encrypt(nonce, secret.reveal(), record.associated("secret"))
    return f"{FORMAT}.{master.id}.{_encode(wrapped)}.{_encode(sealed)}"


def open_sealed(master: MasterKey, record: Record, sealed: str) -> Secret:
    """The secret that `seal` closed for exactly this record. Raises SealBroken for everything else."""
    parts = _SEALED.fullmatch(sealed)
    if not parts:
        raise SealBroken("its sealed text is damaged")
    key = master.find(parts[1])
    if key is None:
        raise SealBroken(f"it is sealed under master key {parts[1]}, and this proxy has {master.id}")
    try:
        data_key = key.unwrap(_decode(parts[2]), record.associated("key"))
        body = _decode(parts[3])
        return Secret(AESGCM(data_key).decrypt(body[:_NONCE], body[_NONCE:], record.associated("secret")))
    except (InvalidTag, ValueError, TypeError, RecursionError):
        raise SealBroken("it was changed after it was sealed") from None


def reseal(master: MasterKey, stored: Stored, random: Random) -> Stored:
    """The same record under `master`, opened with it or a key beside it. Raises SealBroken."""
    secret = open_sealed(master, stored.record, stored.sealed)
    return replace(stored, sealed=seal(master, stored.record, secret, random))


def sealed_under(sealed: str) -> str:
    """The id of the key that a sealed text claims; empty for text of another form."""
    parts = _SEALED.fullmatch(sealed)
    return parts[1] if parts else ""


def mac_matches(secret: Secret, message: bytes, mac: bytes) -> bool:
    """Whether `mac` is HMAC-SHA-256 (RFC 2104) of `message` under a secret that is a key; compared in constant time."""
    return hmac.compare_digest(hmac.digest(secret.reveal(), message, "sha256"), mac)


def _derive(key: bytes, use: bytes, length: int) -> bytes:
    """A key for one use from the master key, which is uniform already: HKDF-Expand alone (RFC 5869 section 3.3)."""
    return HKDFExpand(SHA256(), length, use).derive(key)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decode(text: str) -> bytes:
    """Strict base64url: of the spellings that differ only in unused bits (RFC 4648 section 3.5) one is accepted."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    if _encode(data) != text:
        raise ValueError("not in canonical base64url")
    return data
