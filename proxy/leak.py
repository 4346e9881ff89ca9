"""Finding in outgoing bytes what may not leave: known texts and shapes of tokens, all at once, however they are cut.

Pure. Which texts those are, and what is done about a find, is for the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import re2

from proxy.coding import Undecodable, decoder
from proxy.forms import forms
from proxy.literals import Literals
from proxy.request import Field

MIN_GUARDED = 8  # bytes: what is shorter is sent by chance, and could be found out by asking
REACH = 256  # bytes: of a longer text only so much is looked for, and a stream never holds back more
MAX_HELD = 64 * 1024  # bytes of a coded body that wait for what is inside them
MAX_EXPANDED = 4 * 1024 * 1024  # bytes that one read of a coded body may decode to
_PROBE = 8  # bytes of a text that are let go before the rest is held: fewer stand at the end of a message by chance
_SHORT, _REMEMBERED = 4096, 1024  # bytes of headers that are worth remembering, and how many of them
_CANDIDATES = 32  # shapes that turned out to be none, after which those inside one another are passed over


class Finding(NamedTuple):
    """What was found: `credential`, `canary`, `token`, `placeholder` or `key`, and its name, which is no secret."""

    kind: str
    name: str


class Leak(Exception):
    """What may not leave was found; None: what cannot be looked into any further."""

    def __init__(self, finding: Finding | None) -> None:
        self.finding = finding
        super().__init__("leak")


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens known by their form, as RE2 in Latin-1. `begin` are the literal texts one can begin with, `rest` the
    characters that may follow; `name` tells which token a match is, or None where a checksum does not fit."""

    form: str
    begin: tuple[bytes, ...]
    rest: str
    name: Callable[[bytes], Finding | None]


_OPTIONS = re2.Options()
_OPTIONS.encoding = re2.Options.Encoding.LATIN1
_OPTIONS.log_errors = False
_OPTIONS.one_line = True
_OPTIONS.max_mem = 256 << 20  # bytes: the patterns of a thousand credentials want some tens of millions


def _compile(pattern: bytes) -> re2._Regexp:
    """A regular expression of which no copy is kept: re2 remembers what it compiled."""
    try:
        return re2.compile(pattern, _OPTIONS)
    finally:
        re2.purge()


def _any(texts: Iterable[bytes]) -> bytes:
    return b"|".join(map(re2.escape, sorted(texts, key=len, reverse=True)))


def spellings(secret: bytes) -> set[bytes]:
    """What to look for where `secret` may not leave: those it can come back in, hex, and as a host name has it."""
    if len(secret) < MIN_GUARDED:
        return set()
    found = {*forms(secret), secret.hex().encode(), secret.hex().upper().encode(), secret.lower()}
    return {text[:REACH] for text in found if len(text) >= MIN_GUARDED}


class Detector:
    """Looks for all of `texts` and `shapes` in one pass: some 2 microseconds for a request's head, 140 for 64 KiB,
    whether there are ten texts or a thousand; 6 for 64 KiB that are seen to be clean of ten."""

    __slots__ = ("_begin", "_clean", "_heads", "_literals", "_regex", "_shapes", "_texts")

    def __init__(self, texts: Mapping[bytes, Finding], shapes: Iterable[Shape] = ()) -> None:
        """`texts`: what to look for, each at most `REACH` bytes."""
        self._texts = dict(texts)
        self._clean: set[tuple[Field, ...]] = set()
        self._shapes = [
            (_compile(s.form.encode("latin-1")), _compile(b"(?:%s)%s" % (_any(s.begin), s.rest.encode())), s)
            for s in shapes
        ]
        patterns = [_any(self._texts), *(shape.form.encode("latin-1") for *_, shape in self._shapes)]
        self._regex = _compile(b"|".join(filter(None, patterns))) if any(patterns) else None
        self._heads: dict[bytes, list[bytes]] = {}
        for text in self._texts:
            self._heads.setdefault(text[: min(_PROBE, (len(text) + 1) // 2)], []).append(text)
        begins = [*self._heads, *(begin for *_, shape in self._shapes for begin in shape.begin)]
        self._begin = _compile(_any(begins)) if begins else None
        self._literals = Literals((*self._texts, *(begin for *_, shape in self._shapes for begin in shape.begin)))

    def finds_nothing(self, data: bytes) -> bool:
        """Whether nothing in `data` even looks like what is sought."""
        return self._regex is None or self._literals.absent(data) or self._regex.search(data) is None

    def find_nothing_in_headers(self, headers: tuple[Field, ...]) -> bool:
        """The same for a request's headers, remembered: a client mostly sends the same ones again."""
        if headers in self._clean:
            return True
        data = b"\n".join(chain.from_iterable(headers))
        if not self.finds_nothing(data):
            return False
        if len(data) <= _SHORT:
            if len(self._clean) >= _REMEMBERED:
                self._clean.clear()
            self._clean.add(headers)
        return True

    def find(self, data: bytes) -> Iterator[tuple[int, Finding]]:
        """Where in `data` something was found, and what."""
        if self._literals.absent(data):
            return
        at, candidates = 0, 0
        while self._regex and (match := self._regex.search(data, at)):
            start, end = match.span()
            text = data[start:end]
            finding = self._texts.get(text) or self._named(text)
            if finding:
                yield start, finding
            candidates += 1
            at = start + 1 if candidates <= _CANDIDATES else end

    def _named(self, text: bytes) -> Finding | None:
        return next((f for form, _, s in self._shapes if form.fullmatch(text) and (f := s.name(text))), None)

    def undecided(self, data: bytes) -> int:
        """Where in the last `REACH` bytes of `data` something begins that more bytes could complete; else its end."""
        at = max(0, len(data) - REACH + 1)
        while self._begin and (match := self._begin.search(data, at)):
            at = int(match.start())
            end = data[at:]
            if any(t.startswith(end) and t != end for t in self._heads.get(match[0], ())):
                return at
            if any(open_.fullmatch(end) for _, open_, _ in self._shapes):
                return at
            at += 1
        return len(data)


class _Window:
    """The last bytes of one stream, so that what is cut in two is found all the same."""

    __slots__ = ("_past", "kept")

    def __init__(self) -> None:
        self._past = b""
        self.kept = 0  # bytes at its end that must not be passed on yet

    def look(self, chunk: bytes, detector: Detector, allowed: Callable[[Finding], bool]) -> None:
        """Take in `chunk`. Raises Leak."""
        data = self._past + chunk if self._past else chunk
        for _, finding in detector.find(data):
            if not allowed(finding):
                raise Leak(finding)
        sent = len(self._past) - self.kept
        self.kept = len(data) - max(sent, detector.undecided(data))
        self._past = data[-REACH:]


class LeakStream:
    """A body on its way out, as it is and as its content coding hides it. It passes unchanged, or not at all.

    All but a few bytes of a text that is cut in two are held until it is clear what they are; what cannot begin one
    goes at once. A coding nobody here knows, and one that the body does not have, is not undone.
    """

    __slots__ = ("_allowed", "_coded", "_decoder", "_detectors", "_held", "_plain")

    def __init__(
        self, detectors: Iterable[Detector], allowed: Callable[[Finding], bool], content_encoding: str = ""
    ) -> None:
        """`allowed`: whether a find may pass."""
        self._detectors = [(detector, _Window(), _Window()) for detector in detectors]
        self._allowed = allowed
        self._held = b""
        try:
            self._decoder = decoder(content_encoding)
        except Undecodable:
            self._decoder = None

    def feed(self, chunk: bytes) -> bytes:
        """What may pass now. Raises Leak."""
        self._held += chunk
        free = len(self._held)
        for detector, plain, _ in self._detectors:
            plain.look(chunk, detector, self._allowed)
            free = min(free, len(self._held) - plain.kept)
        if self._decoder and self._look_inside(chunk):
            if len(self._held) > MAX_HELD:
                raise Leak(None)
            return b""
        passed, self._held = self._held[: max(0, free)], self._held[max(0, free) :]
        return passed

    def finish(self) -> bytes:
        """The rest, now that the body has ended."""
        rest, self._held = self._held, b""
        return rest

    def _look_inside(self, chunk: bytes) -> bool:
        """Whether what `chunk` decodes to ends in something undecided."""
        assert self._decoder
        size = 0
        try:
            for piece in self._decoder.decode(chunk):
                size += len(piece)
                if size > MAX_EXPANDED:
                    raise Leak(None)
                for detector, _, coded in self._detectors:
                    coded.look(piece, detector, self._allowed)
        except Undecodable:
            self._decoder = None
            return False
        return any(coded.kept for _, _, coded in self._detectors)
