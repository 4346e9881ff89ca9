"""How one exchange reads in the audit log: a line of JSON with the contract's fields in its order (section 8).

Written field by field: through a dictionary and a JSON encoder it costs three times as much, on every request.
"""

from __future__ import annotations

import time
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from math import isfinite

from proxy.agent import Agent
from proxy.exchange import Exchange


def line(exchange: Exchange) -> bytes:
    """One line of ASCII: control characters, C1 included, reach no terminal. What is not known is null. Query values
    are not in `path`.

    Raises ValueError or TypeError for what JSON cannot say.
    """
    agent = exchange.agent
    injected = ",".join(
        [
            f'{{"credential":{_text(one.credential)},"version":{one.version},"location":{_text(one.location)}}}'
            for one in exchange.injected
        ]
    )
    redacted = ",".join(
        [
            f'{{"credential":{_text(name)},"where":{_text(where)},"count":{count}}}'
            for (name, where), count in exchange.redacted.items()
        ]
    )
    return (
        f'{{"time":"{_time(exchange.time)}","id":{_text(exchange.id)},{_agent(agent)},'
        f'"listener":{_text(exchange.listener)},"identity":[{",".join(map(_text, exchange.identity))}],'
        f'"client":{_text(exchange.client)},"method":{_text(exchange.method)},"scheme":{_text(exchange.scheme)},'
        f'"host":{_text(exchange.host)},"port":{exchange.port},"path":{_text(exchange.path.partition("?")[0])},'
        f'"verdict":"{exchange.verdict}","reason":"{exchange.reason}","rule":{_text_or_null(exchange.rule)},'
        f'"rule_at":{_text_or_null(exchange.rule_at)},"policy":{_text_or_null(exchange.policy)},'
        f'"rewritten":{"true" if exchange.rewritten else "false"},"injected":[{injected}],"redacted":[{redacted}],'
        f'"status":{exchange.status or "null"},"request_bytes":{exchange.request_bytes},'
        f'"response_bytes":{exchange.response_bytes},"duration_ms":{_number(exchange.duration * 1e3, 3)},'
        f'"decision_us":{_number(exchange.decision_duration * 1e6, 1)},'
        f'"upstream_ip":{_text_or_null(exchange.upstream_ip)},"trace_id":{_text_or_null(exchange.trace_id)}{_leak(exchange)}}}\n'
    ).encode("ascii")


def _text(value: str) -> str:
    """JSON; a lone surrogate becomes U+FFFD, since strict readers refuse its escape (RFC 8259 section 8.2)."""
    quoted: str = encode_basestring_ascii(value)
    if "\\ud" in quoted:
        quoted = encode_basestring_ascii(value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))
    return quoted


def _text_or_null(value: str) -> str:
    return _text(value) if value else "null"


def _agent(agent: Agent | None) -> str:
    if agent is None:
        return '"agent":null,"labels":{},"on_behalf_of":null'
    labels = ",".join([f"{_text(key)}:{_text(value)}" for key, value in agent.labels.items()])
    return f'"agent":{_text(agent.id)},"labels":{{{labels}}},"on_behalf_of":{_text_or_null(agent.on_behalf_of)}'


def _leak(exchange: Exchange) -> str:
    """Only where there was one."""
    if exchange.leak is None:
        return ""
    kind, name, where = map(_text, exchange.leak)
    return f',"leak":{{"kind":{kind},"name":{name},"where":{where}}}'


def _number(value: float, digits: int) -> float:
    if not isfinite(value):
        raise ValueError("not a number of JSON")
    return round(value, digits)


def _time(seconds: float) -> str:
    """RFC 3339 section 5.6, in UTC with microseconds."""
    micros = round(seconds * 1e6)
    return f"{_second(micros // 1_000_000)}.{micros % 1_000_000:06d}Z"


@lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
