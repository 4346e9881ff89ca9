"""`sallyport gateway`: who may mint tokens for agents. What they print, nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from proxy.clitools import OK, parse_span, print_json, print_table, settings_of, shown_time, with_store
from proxy.gatewaykeys import LIFE, Gateway, GatewayKeys
from proxy.masterkey import load_master_key
from proxy.store import Store

type Arguments = argparse.Namespace


def _gateways[T](arguments: Arguments, work: Callable[[GatewayKeys], Awaitable[T]]) -> T:
    settings = settings_of(arguments)

    async def run(store: Store) -> T:
        master = await load_master_key(settings.state, os.environ, store)
        return await work(GatewayKeys(store, master, settings.state))

    return with_store(settings, run)


def _add(arguments: Arguments) -> int:
    life = parse_span(arguments.ttl, "--ttl") if arguments.ttl else LIFE
    key = _gateways(arguments, lambda gateways: gateways.add(arguments.name, arguments.agents, life))
    if arguments.json:
        print_json({"gateway": arguments.name, "key": key, "agents": arguments.agents, "ttl": life})
        return OK
    print(key)
    print(
        f"gateway {arguments.name} may speak for {', '.join(arguments.agents)}: "
        f"give it this key, which is not shown again; tokens live {life:g} s at most",
        file=sys.stderr,
    )
    return OK


def _list(arguments: Arguments) -> int:
    found = _gateways(arguments, lambda gateways: gateways.list())
    if arguments.json:
        print_json([_data(gateway) for gateway in found])
    elif not found:
        print("no gateways: sallyport gateway add NAME --agents 'coder-*'", file=sys.stderr)
    else:
        rows = [(gateway.name, gateway.problem or ", ".join(gateway.agents), f"{gateway.life:g}s") for gateway in found]
        print_table(("GATEWAY", "AGENTS", "TTL"), rows)
    return OK


def _data(gateway: Gateway) -> dict[str, object]:
    if gateway.problem:
        return {"gateway": gateway.name, "problem": gateway.problem}
    created = shown_time(gateway.created)
    return {"gateway": gateway.name, "agents": list(gateway.agents), "ttl": gateway.life, "created": created}


def _remove(arguments: Arguments) -> int:
    _gateways(arguments, lambda gateways: gateways.remove(arguments.name))
    print(f"removed gateway {arguments.name}; its tokens end within a second", file=sys.stderr)
    return OK


def gateway_parser(gateway: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The verbs of `sallyport gateway`."""
    add = verb(gateway, "add", _add, "register a gateway; prints its key once", data=True)
    add.add_argument("name", metavar="NAME")
    add.add_argument(
        "--agents", action="append", required=True, metavar="GLOB", help="an agent's id or a glob; may be repeated"
    )
    add.add_argument("--ttl", metavar="5m", help="the longest life of a token it mints (default 5m, at most 1h)")
    verb(gateway, "list", _list, "list the gateways, never a key", data=True)
    verb(gateway, "remove", _remove, "end a gateway and its tokens").add_argument("name", metavar="NAME")
