"""How one exchange reads in the audit log: a line of JSON with the contract's fields in its order (section 8).

Written field by field: through a dictionary and a JSON encoder it costs three times as much, on every request.
"""

from __future__ import annotations

import time
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from math import isfinite

from proxy.agent import Agent
from proxy.exchange import Exchange, Injected

_MOST = 1024  # texts remembered of each kind
_SHORT = 256  # characters: only such paths are worth remembering


def line(exchange: Exchange) -> bytes:
    """One line of ASCII: control characters, C1 included, reach no terminal. What is not known is null. Query values
    are not in `path`.

    Raises ValueError or TypeError for what JSON cannot say.
    """
    redacted = ",".join(
        [
            f'{{"credential":{_text(name)},"where":{_text(where)},"count":{count}}}'
            for (name, where), count in exchange.redacted.items()
        ]
    )
    asked = _asked if len(exchange.path) <= _SHORT else _asked.__wrapped__
    injected = _injected(tuple(exchange.injected)) if exchange.injected else ""
    duration, decision = exchange.duration * 1e3, exchange.decision_duration * 1e6
    if not isfinite(duration + decision):
        raise ValueError("not a number of JSON")
    return (
        f'{{"time":"{_time(exchange.time)}","id":{_text(exchange.id)},{_agent(exchange.agent)},'
        f'"listener":{_known(exchange.listener)},"identity":[{_proofs(tuple(exchange.identity))}],'
        f'"client":{_known(exchange.client)},'
        f"{asked(exchange.method, exchange.scheme, exchange.host, exchange.port, exchange.path)},"
        f'"verdict":"{exchange.verdict}","reason":"{exchange.reason.value}",'
        f"{_decided(exchange.rule, exchange.rule_at, exchange.policy)},"
        f'"rewritten":{"true" if exchange.rewritten else "false"},"injected":[{injected}],"redacted":[{redacted}],'
        f'"status":{exchange.status or "null"},"request_bytes":{exchange.request_bytes},'
        f'"response_bytes":{exchange.response_bytes},"duration_ms":{duration:.3f},"decision_us":{decision:.1f},'
        f'"upstream_ip":{_known(exchange.upstream_ip) if exchange.upstream_ip else "null"},'
        f'"trace_id":{_text_or_null(exchange.trace_id)}{_leak(exchange)}}}\n'
    ).encode("ascii")


@lru_cache(maxsize=_MOST)
def _asked(method: str, scheme: str, host: str, port: int, path: str) -> str:
    return (
        f'"method":{_text(method)},"scheme":{_text(scheme)},"host":{_text(host)},"port":{port},'
        f'"path":{_text(path.partition("?")[0])}'
    )


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
