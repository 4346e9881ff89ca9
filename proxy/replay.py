"""Requests that were decided before, driven without deciding them anew. The same bytes, from the same agent in a tunnel
to the same place, are decided alike for as long as nothing has changed that the decision rested on: each of those
things is compared, every time. Where only the target differs, the rules and grants are asked about that, and what they
lead to is the same where they are the same rules.

Only a request is settled of which no rule must see the body, a counter or the clock; any other is decided anew each
time. A small body is looked through each time. An answer that is passed on as it comes, under a head that was looked
through before, needs no hook. What is remembered holds credentials as they are sent; it is forgotten when a lease ends.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

from mitmproxy import http
from mitmproxy.connection import Client

from proxy import auditline
from proxy.agent import NEVER, Agent
from proxy.flow import Cleaned, FlowState, Tunnel, scan, state_of
from proxy.framing import HEAD_END, LINE, HeaderBlock
from proxy.http1 import CONSUMED_BODY, BadMessage, Body, ResponseHead, response_head
from proxy.metrics import Tally
from proxy.outbound import HEADER_KINDS
from proxy.passing import Passing
from proxy.peer import Dial, Peer
from proxy.plan import make_plan
from proxy.pool import Shelf, UpstreamConnection
from proxy.redact import BodyRedactor
from proxy.request import Ambiguous, RequestView
from proxy.settled import LENGTH, Decision, Ground, Replay, Settled, fields_with_length

if TYPE_CHECKING:
    from proxy.hooks import Hooks

MAX_REQUESTS = 16  # in each kind of tunnel
MAX_HEAD = 2048  # bytes of a request
LATELY = 64  # kinds of tunnels that are remembered although none is open
_OF_ONE_EXCHANGE = frozenset({"id", "time", "listener", "client", "decision_duration", "request_bytes"})
_OF_ONE_FLOW = frozenset({"exchange", "sent_at"})

type Key = tuple[bytes, bytes, bytes]  # the method, and the header lines before and behind the content length


class Apart(NamedTuple):
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
        if told := LENGTH.search(lines):
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

    def __init__(self, addon: Hooks) -> None:
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
        ground, exchange, view, guarded = state.rests_on, state.exchange, state.view, state.guarded
        agent = exchange.agent if exchange else None
        if not (ground and exchange and agent and view and guarded):
            return None
        if exchange.counted or state.placeholders or state.sign or state.body:
            return None
        names = dict.fromkeys(injection.credential for rule in state.rules for injection in rule.inject)
        leases = tuple([ground.leased[name] for name in names])
        length = int(block.lengths[0]) if block.lengths else 0
        decision = Decision(
            ground,
            until=min([agent.expires, *(lease.grant.expires for lease in leases)]),
            lease_until=min([lease.until for lease in leases], default=NEVER),
            leases=leases,
            block=block,
            request=flow.request,
            length=length,
            exchange={name: value for name, value in vars(exchange).items() if name not in _OF_ONE_EXCHANGE},
            state={name: value for name, value in vars(state).items() if name not in _OF_ONE_FLOW},
            shelf=shelf,
            tally=Tally(exchange, len(leases)),
            words=auditline.words(exchange),
            redactor=state.redactor,
            edits=state.response_edits,
            formats=guarded[1],
            rules=state.rules,
            of_head=flow.request.data.method == b"HEAD",
            close=state.close,
        )
        asked = auditline.asked(exchange.method, exchange.scheme, exchange.host, exchange.port, exchange.path)
        return Settled(decision, view, exchange.path, flow.request.data.path, length, message, asked)

    @staticmethod
    def _holds_for_any_target(settled: Settled) -> bool:
        """Whether nothing that is done with the request depends on its target, beyond which rules allow it."""
        decision = settled.decision
        policy = decision.ground.policy
        if decision.exchange["rewritten"] or policy is None or policy.reads_bodies:
            return False
        if settled.length and not LENGTH.search(settled.message):
            return False
        injections = [injection for rule in decision.rules for injection in rule.inject]
        kinds = {lease.name: lease.kind for lease in decision.leases}
        return all((one.kind or kinds.get(one.credential)) in HEADER_KINDS for one in injections)

    def recall(self, client: Client, raw: bytes) -> Replay | None:
        """A request with these bytes, on its way as one before it was, if all that this rested on is as it was then. It
        has begun, and ends by `end` or with the flow that takes it over."""
        started = time.perf_counter()
        peer = self._addon.peers[client.id]
        table = peer.settled
        if table is None:
            if peer.tunnel is None:
                return None
            table = peer.settled = self._table(peer.tunnel)
        if peer.sni_mismatch or peer.replay:
            return None
        now = self._runtime.clock()
        settled = table.same.get(raw)
        if settled is None:
            settled = self._alike(table, raw, now)
            if settled is None:
                return None
        elif not self._holds(settled.decision, now):
            return None
        replay = peer.replay = Replay(settled, peer, now, started)
        return replay

    def ground(self, *, known: bool) -> Ground | None:
        """What a decision rests on now; None where it is not `known` that this is all."""
        runtime = self._runtime
        if not known:
            return None
        return Ground(runtime.rules.policy, runtime.registry.epoch, runtime.leased(), runtime.leaks.detector)

    def _holds(self, decision: Decision, now: float) -> bool:
        """Whether all of it is as it was."""
        runtime, ground = self._runtime, decision.ground
        vault = runtime.vault
        return (
            vault is not None
            and ground.policy is runtime.rules.policy
            and ground.agents is runtime.registry.epoch
            and ground.leased is vault.leased()
            and ground.detector is runtime.leaks.detector
            and decision.until > now
            and decision.lease_until > vault.monotonic()
            and not runtime.audit.refuses
        )

    def _alike(self, table: Table, raw: bytes, now: float) -> Settled | None:
        """What is settled of a request that differs from an earlier one by its target alone, if the same rules allow it
        and the same grants cover it. Whatever else may be to say about it is said where requests are decided."""
        apart = Apart.parse(raw)
        known = table.alike.get(apart.key) if apart else None
        if apart is None or known is None or not self._holds(known.decision, now):
            return None
        length = known.length if apart.length is None else apart.length
        if length > CONSUMED_BODY:
            return None
        decision, first = known.decision, known.view
        agent: Agent = decision.exchange["agent"]
        target = apart.target.decode("latin-1")
        try:
            view = RequestView.of(first.method, first.scheme, first.host, first.port, target, decision.block.facts)
        except Ambiguous:
            return None
        if length != known.length:
            view = view.with_headers(tuple(fields_with_length(view.headers, length)))
        assert decision.ground.policy
        plan = make_plan(decision.ground.policy, agent, view)
        if not plan.decision.allowed or plan.rules != decision.rules or plan.view is not view:
            return None
        for lease in decision.leases:
            if lease.grant.refusal(agent, view, now):
                return None
        if not self._runtime.leaks.is_clean_url(view, formats=decision.formats):
            return None
        settled = known.retargeted(view, length)
        if len(raw) <= MAX_HEAD and _seen(table.same, raw):
            table.same[raw] = settled
        return settled

    def may_leave(self, replay: Replay, body: bytes) -> bool:
        """Whether nothing in a request's body even looks like what may not leave. If so it is counted."""
        if not self._runtime.leaks.is_clean(body, formats=replay.settled.decision.formats):
            return False
        replay.request_bytes = len(body)
        return True

    def answer(self, replay: Replay, upstream: UpstreamConnection, data: bytes) -> tuple[bytes, Passing | None] | None:
        """What the client gets for `data`, with which an answer begins, and what passes on the rest, if any. None: it
        must go through the hooks, because its head is a new one, or a secret is in it."""
        decision = replay.settled.decision
        end = data.find(HEAD_END) + len(HEAD_END)
        try:
            head = response_head(data[:end], decision.of_head)
        except BadMessage:
            return None
        known: Cleaned | None = head.cleaned if head else None
        redactor = decision.redactor
        if (
            head is None
            or known is None
            or known.redactor is not redactor
            or known.edits is not decision.edits
            or known.coded
            or not head.keep_alive
            or decision.close
            or self._addon.draining
        ):
            return None
        body, length, streamed = data[end:], head.length, known.streamed
        if length == len(body):
            streamed = None
            if redactor and redactor.finds(body):
                return None
        elif streamed is None or (length is not None and length < len(body)):
            return None
        replay.status = head.status
        replay.upstream_duration = time.perf_counter() - replay.sent_at
        peername = upstream.server.peername
        replay.upstream_ip = peername[0] if peername else ""
        if streamed is None:
            replay.response_bytes = len(body)
            return known.lines + body, None
        rest = _rest(replay, head, upstream.buffer)
        return streamed + (rest.feed(body) if body else b""), rest

    def take_over(self, flow: http.HTTPFlow, replay: Replay) -> None:
        """From here on `flow`, which carries its state, is what ends the exchange."""
        peer = self._addon.peers[flow.client_conn.id]
        place, leases = replay.settled.decision.shelf.place, replay.settled.decision.leases
        self._runtime.metrics.replayed(len(leases))
        peer.replay, peer.open[id(flow)] = None, flow
        peer.dials.setdefault((place.host.name, place.port), Dial(place.host, place.private))

    def end(self, client: Client) -> None:
        """Put the exchange on record, if one is under way."""
        if peer := self._addon.peers.get(client.id):
            self.end_of(peer)

    def end_of(self, peer: Peer) -> None:
        """The same for a client that may be gone."""
        if replay := peer.replay:
            peer.replay = None
            if replay.is_plain:
                self._runtime.repeat(replay)
            else:
                self._runtime.metrics.replayed(len(replay.settled.decision.leases))
                self._runtime.finish(replay.state)


def _rest(replay: Replay, head: ResponseHead, buffer: bytearray) -> Passing:
    redactor = replay.settled.decision.redactor
    body = replay.response_body = BodyRedactor(redactor) if redactor else None

    def look_through(data: bytes) -> list[bytes]:
        replay.response_bytes += len(data)
        return scan(body, data) if body else [data]

    return Passing(Body(head.length), buffer, look_through, chunked=head.length is None or body is not None)
