"""`sallyport canary`: tokens that open nothing and may never leave. What they print, nothing else."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from proxy.canary import PREFIX, Canaries
from proxy.clitools import OK, print_json, print_table, settings_of, shown_time, with_store
from proxy.masterkey import load_master_key
from proxy.store import Store

type Arguments = argparse.Namespace


def _canaries[T](arguments: Arguments, work: Callable[[Canaries], Awaitable[T]]) -> T:
    settings = settings_of(arguments)

    async def run(store: Store) -> T:
        return await work(Canaries(store, await load_master_key(settings.state, os.environ, store)))

    return with_store(settings, run)


def _add(arguments: Arguments) -> int:
    token = _canaries(arguments, lambda canaries: canaries.add(arguments.name, time.time(), arguments.prefix))
    if arguments.json:
        print_json({"canary": arguments.name, "token": token})
        return OK
    print(token)
    print(
        f"canary {arguments.name}: put it where nobody should look; a request that carries it is refused and on record",
        file=sys.stderr,
    )
    return OK


def _list(arguments: Arguments) -> int:
    found = _canaries(arguments, lambda canaries: canaries.list())
    if arguments.json:
        print_json([{"canary": c.name, "token": c.token or None, "created": shown_time(c.created)} for c in found])
    elif not found:
        print("no canaries: sallyport canary add NAME", file=sys.stderr)
    else:
        rows = [(c.name, c.token or "made under another master key", shown_time(c.created) or "") for c in found]
        print_table(("CANARY", "TOKEN", "CREATED"), rows)
    return OK


def _remove(arguments: Arguments) -> int:
    _canaries(arguments, lambda canaries: canaries.remove(arguments.name))
    print(f"removed canary {arguments.name}", file=sys.stderr)
    return OK


def canary_parser(canary: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The arguments of `sallyport canary`."""
    add = verb(canary, "add", _add, "make a token that opens nothing and may never leave; prints it", data=True)
    add.add_argument("name", metavar="NAME")
    add.add_argument("--prefix", default=PREFIX, metavar="TEXT", help=f"what it begins with (default: {PREFIX})")
    verb(canary, "list", _list, "list the canaries with their tokens", data=True)
    verb(canary, "remove", _remove, "forget a canary").add_argument("name", metavar="NAME")
