"""The one guard of every hook: mitmproxy logs an addon's exception and lets the flow go on, we refuse."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

_log = logging.getLogger("sallyport")


def where(error: BaseException) -> str:
    """The kind and our own line of an exception: its message could quote a secret."""
    frames = traceback.extract_tb(error.__traceback__)
    place = frames[-1] if frames else None
    return f"{type(error).__name__} at {os.path.basename(place.filename)}:{place.lineno}" if place else str(type(error))


def guarded(refuse: Callable[[Any, Any], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A hook that refuses by `refuse` when it raises: mitmproxy itself would log it and let the flow go on."""

    def decorate(hook: Callable[..., Any]) -> Callable[..., Any]:
        def failed(addon: Any, data: Any, error: Exception) -> None:
            _log.error("%s failed and refused: %s", hook.__name__, where(error))
            refuse(addon, data)

        if inspect.iscoroutinefunction(hook):

            @functools.wraps(hook)
            async def awaited(self: Any, data: Any) -> None:
                try:
                    await hook(self, data)
                except Exception as error:
                    failed(self, data, error)

            return awaited

        async def finished(self: Any, data: Any, rest: Coroutine[Any, Any, None]) -> None:
            try:
                await rest
            except Exception as error:
                failed(self, data, error)

        @functools.wraps(hook)
        def called(self: Any, data: Any) -> Coroutine[Any, Any, None] | None:
            try:
                rest = hook(self, data)
                return finished(self, data, rest) if rest is not None else None
            except Exception as error:
                failed(self, data, error)
                return None

        return called

    return decorate
