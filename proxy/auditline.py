"""How one exchange reads in the audit log: a line of JSON with the contract's fields in its order (section 8).

Written field by field: through a dictionary and a JSON encoder it costs three times as much, on every request.
"""

from __future__ import annotations

import time
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from math import isfinite
from typing import NamedTuple

from proxy.agent import Agent
from proxy.exchange import Exchange, Injected

_MOST = 1024  # texts remembered of each kind


class Words(NamedTuple):
    """What a line says of who asked, what was decided and what was done to it, as JSON: exchanges that are decided
    alike have the same."""

    agent: str
    identity: str
    decided: str
    trace: str


def line(exchange: Exchange) -> bytes:
    """One line of ASCII: control characters, C1 included, reach no terminal. What is not known is null. Query values
    are not in `path`.

    Raises ValueError or TypeError for what JSON cannot say.
    """
    return written(
        words(exchange),
        asked(exchange.method, exchange.scheme, exchange.host, exchange.port, exchange.path),
        exchange.time,
        exchange.id,
        exchange.listener,
        exchange.client,
        exchange.status,
        exchange.request_bytes,
        exchange.response_bytes,
        exchange.duration,
        exchange.decision_duration,
        exchange.upstream_ip,
    )


def written(
    words: Words,
    asked: str,
    began: float,
    exchange_id: str,
    listener: str,
    client: str,
    status: int,
    request_bytes: int,
    response_bytes: int,
    duration: float,
    decision: float,
    upstream_ip: str,
) -> bytes:
    """A line of these words, and those of `asked`; times and durations are seconds. Raises as `line`."""
    agent, identity, decided, trace = words
    duration, decision = duration * 1e3, decision * 1e6
    if not isfinite(duration + decision):
        raise ValueError("not a number of JSON")
    return (
        f'{{"time":"{_time(began)}","id":{_text(exchange_id)},{agent},"listener":{_known(listener)},'
        f'"identity":{identity},"client":{_known(client)},{asked},{decided},"status":{status or "null"},'
        f'"request_bytes":{request_bytes},"response_bytes":{response_bytes},"duration_ms":{duration:.3f},'
        f'"decision_us":{decision:.1f},"upstream_ip":{_known(upstream_ip) if upstream_ip else "null"},{trace}}}\n'
    ).encode("ascii")


def words(exchange: Exchange) -> Words:
    """What is to say of an exchange beside its target, times, sizes and places."""
    redacted = ",".join(
        [
            f'{{"credential":{_text(name)},"where":{_text(where)},"count":{count}}}'
            for (name, where), count in exchange.redacted.items()
        ]
    )
    injected = _injected(tuple(exchange.injected)) if exchange.injected else ""
    return Words(
        _agent(exchange.agent),
        f"[{_proofs(tuple(exchange.identity))}]",
        f'"verdict":"{exchange.verdict}","reason":"{exchange.reason.value}",'
        f"{_decided(exchange.rule, exchange.rule_at, exchange.policy)},"
        f'"rewritten":{"true" if exchange.rewritten else "false"},"injected":[{injected}],"redacted":[{redacted}]',
        f'"trace_id":{_text_or_null(exchange.trace_id)}{_leak(exchange)}',
    )


def asked(method: str, scheme: str, host: str, port: int, path: str) -> str:
    """What a line says of what was asked for."""
    place = _place(method, scheme, host, port)
    return f'{place},"path":{_text(path.partition("?")[0])}'


@lru_cache(maxsize=_MOST)
def _place(method: str, scheme: str, host: str, port: int) -> str:
    return f'"method":{_text(method)},"scheme":{_text(scheme)},"host":{_text(host)},"port":{port}'


@lru_cache(maxsize=_MOST)
def _decided(rule: str, rule_at: str, policy: str) -> str:
    return f'"rule":{_text_or_null(rule)},"rule_at":{_text_or_null(rule_at)},"policy":{_text_or_null(policy)}'


@lru_cache(maxsize=_MOST)
def _injected(injected: tuple[Injected, ...]) -> str:
    return ",".join(
        [
            f'{{"credential":{_text(one.credential)},"version":{one.version},"location":{_text(one.location)}}}'
            for one in injected
        ]
    )


def _text(value: str) -> str:
    """JSON; a lone surrogate becomes U+FFFD, since strict readers refuse its escape (RFC 8259 section 8.2)."""
    quoted: str = encode_basestring_ascii(value)
    if "\\ud" in quoted:
        quoted = encode_basestring_ascii(value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))
    return quoted


_known = lru_cache(maxsize=_MOST)(_text)  # of texts that come again


def _text_or_null(value: str) -> str:
    return _text(value) if value else "null"


def _agent(agent: Agent | None) -> str:
    """Remembered by the object, which does not change: labels have no hash."""
    if agent is None:
        return '"agent":null,"labels":{},"on_behalf_of":null'
    known = _agents.get(id(agent))
    if known and known[0] is agent:
        return known[1]
    labels = ",".join([f"{_text(key)}:{_text(value)}" for key, value in agent.labels.items()])
    said = f'"agent":{_text(agent.id)},"labels":{{{labels}}},"on_behalf_of":{_text_or_null(agent.on_behalf_of)}'
    if len(_agents) >= _MOST:
        _agents.clear()
    _agents[id(agent)] = agent, said
    return said


_agents: dict[int, tuple[Agent, str]] = {}


@lru_cache(maxsize=_MOST)
def _proofs(identity: tuple[str, ...]) -> str:
    return ",".join(map(_text, identity))


def _leak(exchange: Exchange) -> str:
    """Only where there was one."""
    if exchange.leak is None:
        return ""
    kind, name, where = map(_text, exchange.leak)
    return f',"leak":{{"kind":{kind},"name":{name},"where":{where}}}'


def _time(seconds: float) -> str:
    """RFC 3339 section 5.6, in UTC with microseconds."""
    whole, micros = divmod(int(seconds * 1e6 + 0.5), 1_000_000)
    return f"{_second(whole)}.{micros:06d}Z"


@lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
