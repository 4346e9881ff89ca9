"""`python -m tests.wire.planted run ...`: the proxy, in which the function named in the file PLANT raises.

A hook is planted inside its guard, as a mistake of ours would be.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proxy.addon import Addon
from proxy.cli import main

PLANT = Path(os.environ.get("PLANT", os.devnull))
ENTRIES = {  # what the two drivers ask the addon beside its hooks, and which of them does
    "enter_tunnel": "fast",
    "http_layer": "both",
    "may_send": "both",
    "tunnel_of": "both",
    "leaf": "both",
    "certificate_host": "both",
    "may_pass": "both",
    "pass_through": "both",
    "passage_failed": "both",
    "is_mismatched": "fast",
    "dial_of": "fast",
    "wants_close": "fast",
    "refuse": "both",
    "refuse_head": "both",
    "refuse_tunnel": "both",
    "refuse_flood": "both",
    "stop_body": "both",
}
INNER = (
    "proxy.addon:Addon._identify",
    "proxy.addon:Addon._record",
    *(f"proxy.addon:Addon.{name}" for name in ENTRIES),
    "proxy.flow:view_of",
    "proxy.flow:write_request",
    "proxy.flow:clean_response_headers",
    "proxy.gateway:Gateway.approve",
    "proxy.vault:Vault.open",
    "proxy.vault:Vault.check",
    "proxy.replay:Replays.recall",
    "proxy.replay:Replays.may_leave",
    "proxy.replay:Replays.answer",
    "proxy.upstream:Upstream.addresses",
    "proxy.redact:Replacer.finds",
    "proxy.redact:BodyRedactor.feed",
    "proxy.redact:BodyRedactor.finish",
    "proxy.metrics:Metrics.record",
    "proxy.audit:Audit.record",
)


class Planted(Exception):
    """No mistake of ours."""


def raising[F: Callable[..., Any]](name: str, function: F) -> F:
    """`function`, or an exception while it is its turn."""

    def check() -> None:
        if PLANT.read_text() == name:
            PLANT.with_suffix(".met").write_text(name)
            raise Planted("real-key-4f1e9b7c2d")

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **options: Any) -> Any:
            check()
            return await function(*args, **options)

        return awaited  # type: ignore[return-value]

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        check()
        return function(*args, **options)

    return called  # type: ignore[return-value]


def plant() -> None:
    """Make every hook and every function of INNER one that can raise."""
    for name, hook in inspect.getmembers_static(Addon):
        if inspect.isfunction(hook) and (inner := getattr(hook, "__wrapped__", None)):
            (cell,) = [cell for cell in hook.__closure__ if cell.cell_contents is inner]
            cell.cell_contents = raising(name, inner)
    for name in INNER:
        module, _, path = name.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, last = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        planted = raising(name, getattr(owner, last))
        is_static = isinstance(inspect.getattr_static(owner, last), staticmethod)
        setattr(owner, last, staticmethod(planted) if is_static else planted)


if __name__ == "__main__":
    plant()
    sys.exit(main())
