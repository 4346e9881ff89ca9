"""Requests that were decided before, driven without deciding them anew. The same bytes, from the same agent in a tunnel
to the same place, are decided alike for as long as nothing has changed that the decision rested on: each of those
things is compared, every time. Where only the target differs, the rules and grants are asked about that, and what they
lead to is the same where they are the same rules.

Only a request is settled of which no rule must see the body, a counter or the clock; any other is decided anew each
time. A small body is looked through each time. An answer that is passed on as it comes, under a head that was looked
through before, needs no hook. What is remembered holds credentials as they are sent; it is forgotten when a lease ends.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

from mitmproxy import http
from mitmproxy.connection import Client, Server

from proxy.agent import NEVER, Agent
from proxy.exchange import Exchange
from proxy.flow import Cleaned, FlowState, Tunnel, fast_headers, state_of
from proxy.framing import HEAD_END, LINE, HeaderBlock
from proxy.http1 import CONSUMED_BODY, BadMessage, response_head
from proxy.leak import Detector
from proxy.outbound import HEADER_KINDS
from proxy.peer import Dial, ulid
from proxy.plan import make_plan
from proxy.policy import Policy
from proxy.pool import Shelf
from proxy.request import Ambiguous, Field, RequestView
from proxy.vault import Lease

if TYPE_CHECKING:
    from proxy.addon import Addon

MAX_REQUESTS = 16  # in each kind of tunnel
MAX_HEAD = 2048  # bytes of a request
LATELY = 64  # kinds of tunnels that are remembered although none is open
_OF_ONE_EXCHANGE = frozenset({"id", "time", "listener", "client", "decision_duration", "request_bytes"})
_OF_ONE_FLOW = frozenset({"exchange", "sent_at"})
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?(0|[1-9][0-9]{0,17})(?=\r\n)")

type Key = tuple[bytes, bytes, bytes]  # the method, and the header lines before and behind the content length


class Ground(NamedTuple):
    """What every decision rests on beside the request. None of it is changed in place: what is the same object says the
    same. `agents` is the registry's epoch."""

    policy: Policy | None
    agents: object
    leased: Mapping[str, Lease]
    detector: Detector


@dataclass(slots=True, eq=False)
class Settled:
    """What came of it: the request as it goes out, which nobody changes any more, what exchange and flow say, and
    which connections can carry it. It holds until the first expiry, of the agent or a grant (`until`, Unix seconds) or
    of a lease (`lease_until`, monotonic)."""

    ground: Ground
    until: float
    lease_until: float
    block: HeaderBlock
    request: http.Request
    exchange: dict[str, Any]
    state: dict[str, Any]
    leases: tuple[Lease, ...]
    length: int  # of the body
    message: bytes  # without the body
    shelf: Shelf

    def own_request(self, **changed: object) -> http.Request:
        """A copy for a flow, which may change it."""
        data: http.RequestData = object.__new__(http.RequestData)
        data.__dict__ = {**vars(self.request.data), **changed}
        request: http.Request = object.__new__(http.Request)
        request.__dict__ = {"data": data, "stream": False}
        return request

    def retargeted(self, view: RequestView, length: int) -> Settled:
        """The same for a request that was found to be alike, with a body of another length."""
        path = view.path_and_query.encode("latin-1")
        request = self.own_request(path=path)
        data = request.data
        lines = self.message[self.message.index(b"\r\n") :]
        if length != self.length:
            lines = _lines_with_length(lines, length)
            data.headers = fast_headers(_fields_with_length(data.headers.fields, length))
        exchange, state = {**self.exchange, "path": view.path}, {**self.state, "view": view}
        message = b"%b %b HTTP/1.1%b" % (data.method, path, lines)
        return Settled(
            self.ground,
            self.until,
            self.lease_until,
            self.block,
            request,
            exchange,
            state,
            self.leases,
            length,
            message,
            self.shelf,
        )


def _lines_with_length(lines: bytes, length: int) -> bytes:
    told = _LENGTH.search(lines)
    assert told
    return b"%b%d%b" % (lines[: told.start(1)], length, lines[told.end(1) :])


def _fields_with_length(fields: tuple[Field, ...], length: int) -> list[Field]:
    """Header fields that say another content length."""
    return [(name, b"%d" % length if name.lower() == b"content-length" else value) for name, value in fields]


@dataclass(frozen=True, slots=True)
class Apart:
    """A request's head: what it has in common with others, what it asks for, and its content length where that is
    spelt as usual."""

    key: Key
    target: bytes
    length: int | None

    @staticmethod
    def parse(raw: bytes) -> Apart | None:
        """None: it is another kind of request than those which are settled."""
        line = LINE.match(raw)
        if line is None or line[3] != b"HTTP/1.1" or line[2][:1] != b"/":
            return None
        lines = raw[line.end() - 2 :]
        if told := _LENGTH.search(lines):
            return Apart((line[1], lines[: told.start(1)], lines[told.end(1) :]), line[2], int(told[1]))
        return Apart((line[1], lines, b""), line[2], None)


class Table:
    """What was settled in one kind of tunnel. `same`: by the request's bytes; `alike`: by its method and header lines,
    for any target. None: it was seen once, and is settled the next time."""

    __slots__ = ("__weakref__", "alike", "same")

    def __init__(self) -> None:
        self.same: dict[bytes, Settled | None] = {}
        self.alike: dict[Key, Settled | None] = {}

    def forget(self) -> None:
        """Forget everything."""
        self.same.clear()
        self.alike.clear()


def _seen[K](table: dict[K, Settled | None], key: K) -> bool:
    """Whether a request was seen already; it is from now on."""
    if key in table:
        return True
    if len(table) >= MAX_REQUESTS:
        table.clear()
    table[key] = None
    return False


class Replays:
    """All that one process remembers: a table for each kind of tunnel, while such a tunnel is open or was lately."""

    def __init__(self, addon: Addon) -> None:
        self._addon = addon
        self._runtime = addon.runtime
        self._tables: WeakValueDictionary[tuple[object, ...], Table] = WeakValueDictionary()
        self._lately: deque[Table] = deque(maxlen=LATELY)

    def _table(self, tunnel: Tunnel) -> Table:
        """What was settled in tunnels of the same agent, by the same proofs and what they told, to the same place."""
        told = (*sorted(tunnel.told.labels.items()), tunnel.told.on_behalf_of) if tunnel.told else ()
        key = tunnel.agent_id, tunnel.host.name, tunnel.port, tunnel.proofs, told
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = Table()
            self._lately.append(table)
        return table

    def forget(self) -> None:
        """Forget everything."""
        for table in self._tables.values():
            table.forget()

    def settle(self, flow: http.HTTPFlow, raw: bytes, block: HeaderBlock, message: bytes, shelf: Shelf) -> None:
        """Remember, of a request that came as `raw` for the second time, was just decided and goes out by `shelf` as
        `message`, what will hold for the next one: unless that may be decided in another way although nothing has
        changed."""
        state, table = state_of(flow), self._addon.peers[flow.client_conn.id].settled
        apart = Apart.parse(raw) if len(raw) <= MAX_HEAD else None
        if table is None or apart is None:
            return
        same, alike = _seen(table.same, raw), _seen(table.alike, apart.key)
        settled = self._settled(flow, state, block, message, shelf) if alike and state.rests_on else None
        if settled and same:
            table.same[raw] = settled
        if settled and self._holds_for_any_target(settled):
            table.alike[apart.key] = settled

    @staticmethod
    def _settled(
        flow: http.HTTPFlow, state: FlowState, block: HeaderBlock, message: bytes, shelf: Shelf
    ) -> Settled | None:
        ground, exchange = state.rests_on, state.exchange
        agent = exchange.agent if exchange else None
        if not (ground and exchange and agent) or exchange.counted or state.placeholders or state.sign or state.body:
            return None
        names = dict.fromkeys(injection.credential for rule in state.rules for injection in rule.inject)
        leases = tuple([ground.leased[name] for name in names])
        known = {name: value for name, value in vars(exchange).items() if name not in _OF_ONE_EXCHANGE}
        told = {name: value for name, value in vars(state).items() if name not in _OF_ONE_FLOW}
        return Settled(
            ground,
            min([agent.expires, *(lease.grant.expires for lease in leases)]),
            min([lease.until for lease in leases], default=NEVER),
            block,
            flow.request,
            known,
            told,
            leases,
            int(block.lengths[0]) if block.lengths else 0,
            message,
            shelf,
        )

    @staticmethod
    def _holds_for_any_target(settled: Settled) -> bool:
        """Whether nothing that is done with the request depends on its target, beyond which rules allow it."""
        policy = settled.ground.policy
        if settled.exchange["rewritten"] or policy is None or policy.reads_bodies:
            return False
        if settled.length and not _LENGTH.search(settled.message):
            return False
        injections = [injection for rule in settled.state["rules"] for injection in rule.inject]
        kinds = {lease.name: lease.kind for lease in settled.leases}
        return all((one.kind or kinds.get(one.credential)) in HEADER_KINDS for one in injections)

    def recall(self, client: Client, raw: bytes) -> FlowState | None:
        """The state of a flow that is decided already, as one with these bytes was before, if all that it rested on is
        as it was then. Its exchange has begun, and ends by `end` or with the flow that takes the state over."""
        started = time.perf_counter()
        peer, runtime = self._addon.peers[client.id], self._runtime
        table = peer.settled
        if table is None:
            if peer.tunnel is None:
                return None
            table = peer.settled = self._table(peer.tunnel)
        now = runtime.clock()
        settled = table.same.get(raw)
        if settled:
            if not self._holds(settled, now):
                return None
        elif (settled := self._alike(table, raw, now)) is None:
            return None
        if peer.sni_mismatch or peer.replay:
            return None
        exchange: Exchange = object.__new__(Exchange)
        exchange.__dict__ = {
            **settled.exchange,
            "id": ulid(now),
            "time": now,
            "listener": peer.listener.address,
            "client": peer.address,
        }
        state: FlowState = object.__new__(FlowState)
        sent_at = time.perf_counter()
        state.__dict__ = {**settled.state, "settled": settled, "exchange": exchange, "sent_at": sent_at}
        exchange.decision_duration = sent_at - started
        runtime.metrics.replayed(len(settled.leases))
        peer.replay = state
        return state

    def ground(self, *, known: bool) -> Ground | None:
        """What a decision rests on now; None where it is not `known` that this is all."""
        runtime = self._runtime
        if not known:
            return None
        return Ground(runtime.rules.policy, runtime.registry.epoch, runtime.leased(), runtime.leaks.detector)

    def _holds(self, settled: Settled, now: float) -> bool:
        """Whether all of it is as it was."""
        runtime, ground = self._runtime, settled.ground
        vault = runtime.vault
        return (
            vault is not None
            and ground.policy is runtime.rules.policy
            and ground.agents is runtime.registry.epoch
            and ground.leased is vault.leased()
            and ground.detector is runtime.leaks.detector
            and settled.until > now
            and settled.lease_until > vault.monotonic()
            and not runtime.audit.refuses
        )

    def _alike(self, table: Table, raw: bytes, now: float) -> Settled | None:
        """What is settled of a request that differs from an earlier one by its target alone, if the same rules allow it
        and the same grants cover it. Whatever else may be to say about it is said where requests are decided."""
        apart = Apart.parse(raw)
        known = table.alike.get(apart.key) if apart else None
        if apart is None or known is None or not self._holds(known, now):
            return None
        length = known.length if apart.length is None else apart.length
        if length > CONSUMED_BODY:
            return None
        first: RequestView = known.state["view"]
        agent: Agent = known.exchange["agent"]
        target = apart.target.decode("latin-1")
        try:
            view = RequestView.of(first.method, first.scheme, first.host, first.port, target, known.block.facts)
        except Ambiguous:
            return None
        if length != known.length:
            view = view.with_headers(tuple(_fields_with_length(view.headers, length)))
        assert known.ground.policy
        plan = make_plan(known.ground.policy, agent, view)
        if not plan.decision.allowed or plan.rules != known.state["rules"] or plan.view is not view:
            return None
        if any(lease.grant.refusal(agent, view, now) for lease in known.leases):
            return None
        if not self._runtime.leaks.is_clean_url(view, formats=known.state["guarded"][1]):
            return None
        settled = known.retargeted(view, length)
        if len(raw) <= MAX_HEAD and _seen(table.same, raw):
            table.same[raw] = settled
        return settled

    def may_leave(self, state: FlowState, body: bytes) -> bool:
        """Whether nothing in a request's body even looks like what may not leave. If so it is counted."""
        assert state.exchange
        assert state.guarded
        if not self._runtime.leaks.is_clean(body, formats=state.guarded[1]):
            return False
        state.exchange.request_bytes = len(body)
        return True

    def answer(self, state: FlowState, server: Server, data: bytes) -> bytes | None:
        """All the bytes that the client gets for an answer that is `data`; None: it must go through the hooks, because
        it is not all there, its head is a new one, or it holds a secret."""
        settled, exchange, redactor = state.settled, state.exchange, state.redactor
        end = data.find(HEAD_END) + len(HEAD_END)
        try:
            head = response_head(data[:end], settled.request.data.method == b"HEAD") if settled else None
        except BadMessage:
            return None
        known: Cleaned | None = head.cleaned if head else None
        if (
            head is None
            or known is None
            or exchange is None
            or known.redactor is not redactor
            or known.edits is not state.response_edits
            or known.coded
            or head.length != len(data) - end
            or not head.keep_alive
            or state.close
            or self._addon.draining
        ):
            return None
        body = data[end:]
        if redactor and redactor.finds(body):
            return None
        exchange.status, exchange.response_bytes = head.status, len(body)
        exchange.upstream_duration = time.perf_counter() - state.sent_at
        exchange.upstream_ip = server.peername[0] if server.peername else ""
        return known.lines + body

    def take_over(self, flow: http.HTTPFlow) -> None:
        """From here on `flow` is what ends the exchange."""
        peer, settled = self._addon.peers[flow.client_conn.id], state_of(flow).settled
        assert settled
        place = settled.shelf.place
        peer.replay, peer.open[id(flow)] = None, flow
        peer.dials.setdefault((place.host.name, place.port), Dial(place.host, place.private))

    def end(self, client: Client) -> None:
        """Put the exchange on record."""
        peer = self._addon.peers.get(client.id)
        if peer and (state := peer.replay):
            peer.replay = None
            self._runtime.finish(state)
