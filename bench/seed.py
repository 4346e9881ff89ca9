"""Registers many agents at once, which the command line does one by one: `seed.py CONFIG COUNT` prints their tokens."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from proxy.masterkey import load_master_key
from proxy.registry import Registry
from proxy.settings import load_settings
from proxy.store import Store


async def main() -> None:
    """The proxy of this configuration runs, and with it its store."""
    settings = load_settings(Path(sys.argv[1]), {}, {}, Path.cwd())
    async with await Store.open(settings.store.reveal(), settings.state) as store:
        registry = Registry(store, await load_master_key(settings.state, os.environ, store))
        for number in range(int(sys.argv[2])):
            print(await registry.add(f"bench-{number}"))


asyncio.run(main())
