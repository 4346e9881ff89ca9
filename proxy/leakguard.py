"""What may not leave with a request: every secret the vault holds, agents' tokens, canaries, and placeholders towards
hosts that may not have what they stand for.

The secrets are those that the master key opens, whether a lease is open for them or not. They stay in memory as
patterns, made anew when the vault changed; no copy of a secret is kept beside them.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from urllib.parse import unquote_to_bytes

from proxy.grant import Grant
from proxy.keyformats import DETECTOR as KEY_FORMATS
from proxy.leak import REACH, Detector, Finding, Leak, LeakStream, Shape, spellings
from proxy.outbound import placeholder_of, secrets_known
from proxy.reason import Reason
from proxy.request import RequestView
from proxy.secret import Secret
from proxy.upstream import Refused
from proxy.vault import Opening

MAX_SECRETS = 2000  # credentials and canaries: their patterns take some 100 MB
HIDDEN = "[redacted]"  # stands on record where a URL held what may not
_DEPTH = 3  # levels of escapes that a query is looked through; of a path every reading is
_WORDS = {
    "placeholder": "The request holds a placeholder for a credential that {host} may not have.",
    "unreadable": "The request's body cannot be looked into.",
}
_TOKEN = re.compile(rb"slp_[0-9A-Za-z]{43}_[0-9a-f]{8}")
_log = logging.getLogger("sallyport")


@dataclass(frozen=True, slots=True)
class Guarded:
    """What is remembered of one credential: the spellings of its secret, its placeholder, and where it may go."""

    patterns: frozenset[bytes]
    placeholder: bytes
    grant: Grant | None


def _guarded(name: str, secret: Secret, fields: Mapping[str, str], grant: Grant | None) -> Guarded:
    [(_, value)] = secrets_known([(name, secret)])
    return Guarded(frozenset(spellings(value)), placeholder_of(name, fields).encode()[:REACH], grant)


class LeakGuard:
    """One per process; `knows` is whether a text is the token of a registered agent."""

    def __init__(self, knows: Callable[[str], bool]) -> None:
        self._credentials: dict[str, Guarded] | None = None
        self._canaries: dict[str, bytes] | None = None
        self._shapes = _token_shapes(knows)
        self.detector = Detector({}, self._shapes)  # another one after each change

    @property
    def loaded(self) -> bool:
        """Whether everything was loaded once; until then nothing may leave."""
        return self._credentials is not None and self._canaries is not None

    async def credentials(self, names: set[str] | None, openings: Iterable[Opening]) -> None:
        """Takes in the credentials of `names` as they are now, or (None) all."""
        opened = {opening[0]: _guarded(*opening) for opening in openings}
        self._credentials = _merged(self._credentials, names, opened)
        await self._build()

    async def canaries(self, names: set[str] | None, tokens: Mapping[str, bytes]) -> None:
        """The same for canary tokens."""
        self._canaries = _merged(self._canaries, names, tokens)
        await self._build()

    async def _build(self) -> None:
        texts = await asyncio.to_thread(self._texts, self._credentials or {}, self._canaries or {})
        self.detector = await asyncio.to_thread(Detector, texts, self._shapes)

    @staticmethod
    def _texts(credentials: Mapping[str, Guarded], canaries: Mapping[str, bytes]) -> dict[bytes, Finding]:
        if len(credentials) + len(canaries) > MAX_SECRETS:
            _log.error("more than %d credentials and canaries: the rest is not looked for in requests", MAX_SECRETS)
        known = list(credentials.items())[:MAX_SECRETS]
        texts = {item.placeholder: Finding("placeholder", name) for name, item in known}
        for name, token in list(canaries.items())[: MAX_SECRETS - len(known)]:
            texts |= dict.fromkeys(spellings(token), Finding("canary", name))
        for name, item in known:
            texts |= dict.fromkeys(item.patterns, Finding("credential", name))
        return texts

    def check(self, view: RequestView, target: RequestView, *, formats: bool) -> bool:
        """Whether what the agent wrote into URL and headers of `view` may go to `target`: raises Leaked if not, and
        Refused until everything is loaded. True: nothing in it even looks like what is sought.

        `formats`: keys of well-known forms may not leave either.
        """
        if not self.loaded:
            raise Refused(Reason.STORE_UNAVAILABLE)
        url, clean = _url(view), True
        for detector in (self.detector, KEY_FORMATS) if formats else (self.detector,):
            if detector.finds_nothing(url) and detector.find_nothing_in_headers(view.headers):
                continue
            clean = False
            data = url + b"\n" + b"\n".join(chain.from_iterable(view.headers))
            for at, finding in detector.find(data):
                if not self._may_pass(target, finding):
                    raise Leaked(finding, "url" if at < len(url) else "header", target)
        return clean

    def is_clean_url(self, view: RequestView, *, formats: bool) -> bool:
        """Whether nothing in the URL of `view` even looks like what is sought."""
        return self.is_clean(_url(view), formats=formats)

    def is_clean(self, data: bytes, *, formats: bool) -> bool:
        """Whether nothing in `data` even looks like what is sought."""
        return self.detector.finds_nothing(data) and not (formats and not KEY_FORMATS.finds_nothing(data))

    def hides(self, view: RequestView, refused: Refused) -> bool:
        """Whether the URL of a refused request holds what may not stand on record either."""
        if isinstance(refused, Leaked) and refused.where == "url":
            return True
        return any(finding.kind != "placeholder" for _, finding in self.detector.find(_url(view)))

    def check_message(self, data: bytes, target: RequestView, *, formats: bool) -> None:
        """The same for a message of a WebSocket. Raises Leaked."""
        stream = self.stream(target, "", formats=formats)
        look_through(stream, data, target, "websocket")

    def stream(self, target: RequestView, content_encoding: str, *, formats: bool) -> LeakStream:
        """What looks through the body of a request to `target`."""
        detectors = (self.detector, KEY_FORMATS) if formats else (self.detector,)
        return LeakStream(detectors, partial(self._may_pass, target), content_encoding)

    def _may_pass(self, target: RequestView, finding: Finding) -> bool:
        if finding.kind != "placeholder":
            return False
        known = (self._credentials or {}).get(finding.name)
        return known is None or known.grant is None or known.grant.covers_host(target)


class Leaked(Refused):
    """A request that holds what may not leave. The agent is not told which secret: it could find one out by asking."""

    def __init__(self, finding: Finding | None, where: str, target: RequestView) -> None:
        self.finding = finding or Finding("unreadable", "")
        self.where = where
        words = _WORDS.get(self.finding.kind, "The request holds a secret, which may not leave.")
        super().__init__(Reason.SECRET_LEAK, words.format(host=target.host))

    @property
    def what(self) -> tuple[str, str, str]:
        """Kind, name and place, for the record."""
        return *self.finding, self.where


def look_through(stream: LeakStream, chunk: bytes, target: RequestView, where: str = "body") -> bytes:
    """What of a body may pass after `chunk`; an empty one ends it. Raises Leaked."""
    try:
        return stream.feed(chunk) if chunk else stream.finish()
    except Leak as leak:
        raise Leaked(leak.finding, where, target) from None


def _merged[T](known: Mapping[str, T] | None, names: Iterable[str] | None, now: Mapping[str, T]) -> dict[str, T]:
    if names is None or known is None:
        return dict(now)
    gone = set(names)
    return {name: value for name, value in known.items() if name not in gone} | dict(now)


def _url(view: RequestView) -> bytes:
    """The URL in each way it can be read; the labels of the host also without the dots between them."""
    host = view.host.name
    parts = [host, *view.readings, view.query]
    if "." in host:
        parts.append(host.replace(".", ""))
    url, query = "\n".join(parts).encode("latin-1", "replace"), view.query.encode("latin-1", "replace")
    for _ in range(_DEPTH):
        if b"%" not in query:
            break
        decoded = unquote_to_bytes(query)
        url += b"\n" + decoded + b"\n" + decoded.replace(b"+", b" ")
        query = decoded
    return url


def _token_shapes(knows: Callable[[str], bool]) -> list[Shape]:
    """An agent's token as it is, and in base64 at each of the three places it can begin."""

    def name(token: bytes) -> Finding | None:
        return Finding("token", "") if knows(token.decode("latin-1")) else None

    def inside(skipped: int, text: bytes) -> Finding | None:
        """`skipped`: characters of base64 before `text` that also carry bits of what stands before the token."""
        coded = b"A" * skipped + text.translate(bytes.maketrans(b"-_", b"+/"))
        decoded = base64.b64decode(coded + b"=" * (-len(coded) % 4))
        found = _TOKEN.match(b"s" + decoded[skipped - (skipped > 0) + 1 :])
        return name(found[0]) if found else None

    shapes = [Shape("slp_[0-9A-Za-z]{43}_[0-9a-f]{8}", (b"slp_",), "[0-9A-Za-z_]*", name)]
    for offset in range(3):
        skipped = (8 * offset + 5) // 6
        own = base64.b64encode(bytes(offset) + b"slp_")[skipped : 8 * (offset + 4) // 6]
        more = -(-8 * (offset + 56) // 6) - skipped - len(own)
        form = f"{own.decode()}[0-9A-Za-z+/_-]{{{more}}}"
        shapes.append(Shape(form, (own,), "[0-9A-Za-z+/_-]*", partial(inside, skipped)))
    return shapes
