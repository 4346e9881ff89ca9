"""`sallyport agent`: registered, shown, stopped, and what its sandbox must export."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from proxy import killswitch
from proxy.agent import Agent, AgentState
from proxy.agentca import forget
from proxy.clitools import (
    OK,
    Arguments,
    pairs,
    parse_ttl,
    print_data,
    print_json,
    print_table,
    settings_of,
    shown_pairs,
    shown_time,
    with_store,
)
from proxy.masterkey import load_master_key
from proxy.problem import UserError
from proxy.registry import Registry
from proxy.running import Running
from proxy.sandboxca import bundle_for
from proxy.sandboxenv import FORMATS, Bundle, variables
from proxy.settings import Settings
from proxy.store import Store, StoreUnavailable


def _agent_add(arguments: Arguments) -> int:
    settings = settings_of(arguments)
    ttl = parse_ttl(arguments.ttl)
    labels = pairs(arguments.label, "--label")
    add = lambda registry: registry.add(arguments.id, labels, ttl, arguments.on_behalf_of or "")  # noqa: E731
    _print_token(arguments, *_issued(settings, arguments.id, add))
    return OK


def _agent_token(arguments: Arguments) -> int:
    issued = _issued(settings_of(arguments), arguments.id, lambda registry: registry.token(arguments.id))
    _print_token(arguments, *issued)
    return OK


def _issued(settings: Settings, agent_id: str, issue: Callable[[Registry], Awaitable[str]]) -> tuple[str, Agent]:
    """The token that `issue` makes, and the agent it is for."""

    async def work(store: Store) -> tuple[str, Agent]:
        registry = Registry(store, await load_master_key(settings.state, os.environ, store))
        return await issue(registry), await registry.show(agent_id)

    return with_store(settings, work)


def _print_token(arguments: Arguments, token: str, agent: Agent) -> None:
    if arguments.json:
        print_json({"agent": agent.id, "token": token, "expires": shown_time(agent.expires)})
        return
    print(token)
    print(
        f'agent {agent.id}: point a shell at the proxy with eval "$(sallyport agent env {agent.id})"', file=sys.stderr
    )


def _agent_list(arguments: Arguments) -> int:
    agents = with_store(settings_of(arguments), lambda store: Registry(store).list())
    if arguments.json:
        print_json([_agent_data(agent) for agent in agents])
    elif not agents:
        print("no agents yet: sallyport agent add ID", file=sys.stderr)
    else:
        rows = [
            (
                agent.id,
                _state(agent),
                shown_time(agent.expires) or "never",
                agent.on_behalf_of,
                shown_pairs(agent.labels),
            )
            for agent in agents
        ]
        print_table(("AGENT", "STATE", "EXPIRES", "ON BEHALF OF", "LABELS"), rows)
    return OK


def _agent_show(arguments: Arguments) -> int:
    agent = with_store(settings_of(arguments), lambda store: Registry(store).show(arguments.id))
    data = _agent_data(agent)
    print_data(arguments, data, 13)
    return OK


def _agent_data(agent: Agent) -> dict[str, object]:
    return {
        "agent": agent.id,
        "state": _state(agent),
        "labels": dict(agent.labels),
        "on_behalf_of": agent.on_behalf_of or None,
        "expires": shown_time(agent.expires),
        "kill_reason": agent.kill_reason or None,
    }


def _state(agent: Agent) -> str:
    return "expired" if agent.state == "active" and agent.expired(time.time()) else str(agent.state)


def _agent_remove(arguments: Arguments) -> int:
    settings = settings_of(arguments)
    with_store(settings, lambda store: Registry(store).remove(arguments.id))
    forget(settings.certs, arguments.id)
    print(f"removed agent {arguments.id}", file=sys.stderr)
    return OK


def _agent_kill(arguments: Arguments) -> int:
    settings, agent_id, reason = settings_of(arguments), _one_or_all(arguments), arguments.reason or ""
    who, undo = agent_id or "every agent", f"undo with: sallyport agent revive {agent_id or '--all'}"
    try:
        with_store(settings, lambda store: Registry(store).kill(agent_id, reason))
    except StoreUnavailable as error:
        killswitch.stop(settings.state, agent_id, reason)
        print(f"killed {who} on this host, by {settings.state / killswitch.FILE}; {undo}", file=sys.stderr)
        if not settings.store.embedded:
            raise UserError(f"other hosts were not told: {error}") from None
    else:
        print(f"killed {who}; {undo}", file=sys.stderr)
    finally:
        forget(settings.certs, agent_id)
    return OK


def _agent_revive(arguments: Arguments) -> int:
    settings, agent_id = settings_of(arguments), _one_or_all(arguments)
    who = agent_id or "every agent"

    async def revive(store: Store) -> bool:
        registry = Registry(store)
        await registry.revive(agent_id)
        return agent_id is not None and (await registry.show(agent_id)).state is AgentState.KILLED

    if killswitch.resume(settings.state, agent_id):
        print(f"{who} is no longer stopped by {settings.state / killswitch.FILE}", file=sys.stderr)
    still = with_store(settings, revive) or killswitch.read_stops(settings.state).everybody is not None
    print(f"revived {who}; connections that were cut stay so", file=sys.stderr)
    if agent_id and still:
        print("every agent is stopped still: sallyport agent revive --all", file=sys.stderr)
    return OK


def _one_or_all(arguments: Arguments) -> str | None:
    if bool(arguments.id) == arguments.all:
        raise UserError("name one agent, or give --all")
    agent_id: str | None = arguments.id
    return agent_id


def _agent_env(arguments: Arguments) -> int:
    settings = settings_of(arguments)
    issued, agent = _issued(settings, arguments.id, lambda registry: registry.reissue(arguments.id))
    written, notes = bundle_for(settings, agent)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    bundle = Bundle(arguments.ca) if arguments.ca else written
    running = Running.read(settings)
    if not running and not arguments.proxy:
        print("note: no proxy runs here with these settings; the address is where it would listen", file=sys.stderr)
    proxy = arguments.proxy or (running or Running.expected(settings)).reachable
    values = variables(arguments.id, issued, proxy, bundle)
    if arguments.json:
        print_json(values)
    else:
        print(FORMATS[arguments.format](values))
    return OK


def agent_parser(agent: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The arguments of `sallyport agent`."""
    add = verb(agent, "add", _agent_add, "register an agent; prints its token once", data=True)
    add.add_argument("id", metavar="ID")
    add.add_argument("--label", action="append", default=[], metavar="K=V")
    add.add_argument("--ttl", metavar="8h", help="how long it may act")
    add.add_argument("--on-behalf-of", metavar="USER")
    verb(agent, "list", _agent_list, "list the agents", data=True)
    for name, command, text in (
        ("show", _agent_show, "show one agent"),
        ("token", _agent_token, "issue a new token and end the old one"),
        ("remove", _agent_remove, "forget an agent"),
    ):
        verb(agent, name, command, text, data=True).add_argument("id", metavar="ID")
    env = verb(agent, "env", _agent_env, "print everything a sandbox must export", data=True)
    env.add_argument("id", metavar="ID")
    env.add_argument("--format", choices=tuple(FORMATS), default="sh")
    env.add_argument("--proxy", metavar="HOST:PORT", help="where the sandbox reaches the proxy (default: the listener)")
    env.add_argument("--ca", metavar="PATH", help="where the CA bundle lies in the sandbox (default: its path here)")
    kill = verb(agent, "kill", _agent_kill, "refuse and cut an agent, or all, within a second")
    kill.add_argument("--reason", metavar="TEXT")
    revive = verb(agent, "revive", _agent_revive, "undo kill")
    for switch in (kill, revive):
        switch.add_argument("id", nargs="?", metavar="ID")
        switch.add_argument("--all", action="store_true")
