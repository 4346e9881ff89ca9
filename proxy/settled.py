"""What was decided of a request, for those that are decided alike, and such a request on its way. Decides nothing: see
`replay`."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mitmproxy import http

from proxy.auditline import Words, asked, written
from proxy.exchange import Exchange
from proxy.fastflow import copy_request
from proxy.flow import FlowState, fast_headers
from proxy.framing import HeaderBlock
from proxy.leak import Detector
from proxy.metrics import Tally
from proxy.peer import Peer, ulid
from proxy.policy import Edit, Policy, Rule
from proxy.pool import Shelf
from proxy.redact import BodyRedactor, Replacer
from proxy.request import Field, RequestView
from proxy.vault import Lease

LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?(0|[1-9][0-9]{0,17})(?=\r\n)")


class Ground(NamedTuple):
    """What every decision rests on beside the request. None of it is changed in place: what is the same object says the
    same. `agents` is the registry's epoch."""

    policy: Policy | None
    agents: object
    leased: Mapping[str, Lease]
    detector: Detector


@dataclass(slots=True, eq=False)
class Decision:
    """What requests have in common that were decided alike: what exchange and flow say, the request as it goes out,
    which nobody changes any more, and which connections can carry it. It holds until the first expiry, of the agent or
    a grant (`until`, Unix seconds) or of a lease (`lease_until`, monotonic)."""

    ground: Ground
    until: float
    lease_until: float
    leases: tuple[Lease, ...]
    block: HeaderBlock
    request: http.Request
    length: int  # of its body
    exchange: dict[str, Any]
    state: dict[str, Any]
    shelf: Shelf
    tally: Tally
    words: Words
    redactor: Replacer | None
    edits: tuple[Edit, ...]
    formats: bool  # whether keys are looked for by their form
    rules: tuple[Rule, ...]
    of_head: bool
    close: bool  # the client wants the connection closed


class Settled(NamedTuple):
    """One request that was decided: its target as it was asked for (`view`, `path`) and as it goes out (`target`), the
    length of its body, all that goes out before the body, and what the audit log says of what was asked."""

    decision: Decision
    view: RequestView
    path: str
    target: bytes
    length: int
    message: bytes
    asked: str

    def own_request(self) -> http.Request:
        """A copy for a flow, which may change it."""
        decision = self.decision
        changed: dict[str, object] = {"path": self.target}
        if self.length != decision.length:
            fields = decision.request.data.headers.fields
            changed["headers"] = fast_headers(fields_with_length(fields, self.length))
        return copy_request(decision.request, **changed)

    def retargeted(self, view: RequestView, length: int) -> Settled:
        """The same for a request that was found to be alike, with a body of another length."""
        message, decision = self.message, self.decision
        target = view.path_and_query.encode("latin-1")
        lines = message[message.index(b"\r\n") :]
        if length != self.length:
            lines = _lines_with_length(lines, length)
        message = b"%b %b HTTP/1.1%b" % (decision.request.data.method, target, lines)
        words = asked(view.method, view.scheme, view.host.name, view.port, view.path)
        return Settled(decision, view, view.path, target, length, message, words)


def _lines_with_length(lines: bytes, length: int) -> bytes:
    told = LENGTH.search(lines)
    assert told
    return b"%b%d%b" % (lines[: told.start(1)], length, lines[told.end(1) :])


def fields_with_length(fields: tuple[Field, ...], length: int) -> list[Field]:
    """Header fields that say another content length."""
    return [(name, b"%d" % length if name.lower() == b"content-length" else value) for name, value in fields]


class Replay:
    """A request on its way that was decided before. It has no exchange, and no flow, unless something happens that the
    hooks must see to: then `state` has them."""

    __slots__ = (
        "_state",
        "client",
        "decision_duration",
        "id",
        "listener",
        "request_bytes",
        "response_body",
        "response_bytes",
        "sent_at",
        "settled",
        "status",
        "time",
        "upstream_duration",
        "upstream_ip",
    )

    def __init__(self, settled: Settled, peer: Peer, now: float, started: float) -> None:
        """`now`: Unix seconds; `started`: when deciding began, as of `time.perf_counter`."""
        self.settled = settled
        self.id = ulid(now)
        self.time = now
        self.listener = peer.listener.address
        self.client = peer.address
        self.request_bytes = self.response_bytes = self.status = 0
        self.upstream_duration: float | None = None
        self.upstream_ip = ""
        self.response_body: BodyRedactor | None = None
        self._state: FlowState | None = None
        self.sent_at = time.perf_counter()
        self.decision_duration = self.sent_at - started

    @property
    def is_plain(self) -> bool:
        """Whether all that is to say of it is said by its decision and its numbers."""
        return self._state is None and not (self.response_body and self.response_body.found)

    @property
    def state(self) -> FlowState:
        """What a flow carries, with the exchange as far as it has come."""
        if self._state is None:
            settled = self.settled
            exchange: Exchange = object.__new__(Exchange)
            exchange.__dict__ = {
                **settled.decision.exchange,
                "path": settled.path,
                **{name: getattr(self, name) for name in _OF_THE_EXCHANGE},
            }
            self._state = state = object.__new__(FlowState)
            state.__dict__ = {
                **settled.decision.state,
                "view": settled.view,
                "exchange": exchange,
                "sent_at": self.sent_at,
                "response_body": self.response_body,
            }
        return self._state

    def line(self, duration: float) -> bytes:
        """Its line in the audit log, after so many seconds."""
        settled = self.settled
        return written(
            settled.decision.words,
            settled.asked,
            self.time,
            self.id,
            self.listener,
            self.client,
            self.status,
            self.request_bytes,
            self.response_bytes,
            duration,
            self.decision_duration,
            self.upstream_ip,
        )


_OF_THE_EXCHANGE = (
    "id",
    "time",
    "listener",
    "client",
    "decision_duration",
    "request_bytes",
    "response_bytes",
    "status",
    "upstream_duration",
    "upstream_ip",
)
