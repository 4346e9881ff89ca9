"""The mitmproxy addon: each hook hands a flow to the rooms that decide, and refuses when anything raises.

Glue only. It sees mitmproxy's flows whichever driver they come from.
"""

from __future__ import annotations

import functools

from proxy.answering import ResponseHooks
from proxy.deciding import RequestHooks
from proxy.tunnels import TunnelHooks


class Addon(TunnelHooks, RequestHooks, ResponseHooks):
    """All of the proxy's hooks."""


@functools.cache
def _script() -> list[object]:
    from proxy.script import Script

    return [Script()]


def __getattr__(name: str) -> object:
    """`addons`, which mitmproxy asks this file for when it is loaded as a script."""
    if name == "addons":
        return _script()
    raise AttributeError(name)
