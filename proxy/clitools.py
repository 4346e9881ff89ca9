"""What the commands share: settings, the store, what is printed, and how values are written on the command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from proxy.agent import NEVER
from proxy.problem import UserError
from proxy.quantity import parse_duration
from proxy.settings import Settings, load_settings
from proxy.store import Store

type Arguments = argparse.Namespace
type Command = Callable[[Arguments], int]

OK, PROBLEMS, USAGE = 0, 1, 2
SETTING_FLAGS = ("listen", "admin", "rules", "certs", "state", "store", "lane")


def settings_of(arguments: Arguments) -> Settings:
    """The settings as flags, environment and file give them.

    Raises Problems.
    """
    flags = {name: value for name in SETTING_FLAGS if (value := getattr(arguments, name, None)) is not None}
    config = getattr(arguments, "config", None) or os.environ.get("SALLYPORT_CONFIG")
    return load_settings(Path(config) if config else None, os.environ, flags, Path.cwd())


def print_json(data: object) -> None:
    """Data as one line of JSON."""
    print(json.dumps(data, ensure_ascii=False))


def with_store[T](settings: Settings, work: Callable[[Store], Awaitable[T]]) -> T:
    """What `work` makes of the store of these settings."""

    async def run() -> T:
        async with await Store.open(settings.store.reveal(), settings.state) as store:
            return await work(store)

    return asyncio.run(run())


def pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """`k=v` arguments as a mapping.

    Raises UserError.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError(f'{flag} {text!r}: write it as "key=value"')
        found[key] = value
    return found


def parse_ttl(text: str | None) -> float | None:
    """Seconds an agent lives from now on.

    Raises UserError.
    """
    return None if text is None else parse_span(text, "--ttl")


def parse_span(text: str, flag: str) -> float:
    """The seconds that a flag gives.

    Raises UserError.
    """
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UserError(f"{flag} {text!r}: {error.args[-1]}") from None


def parse_expires(text: str | None) -> float:
    """Unix seconds from an RFC 3339 time, a date, or a duration from now.

    Raises UserError.
    """
    if text is None:
        return NEVER
    try:
        return time.time() + parse_duration(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f'--expires {text!r}: write "90d", "2027-01-31" or "2027-01-31T12:00:00Z"') from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def shown_time(seconds: float) -> str | None:
    """RFC 3339 in UTC; None for never."""
    if seconds == NEVER:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def shown_pairs(values: Mapping[str, str]) -> str:
    """`k=v` for each."""
    return ", ".join(f"{key}={value}" for key, value in values.items())


def print_data(arguments: Arguments, data: Mapping[str, object], width: int) -> None:
    """Data as JSON where that was asked for, else line by line, the names as wide as `width`."""
    if arguments.json:
        print_json(data)
    else:
        print("\n".join(f"{key:{width}} {_plain(value)}" for key, value in data.items()))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return shown_pairs(value) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "any"
    return "-" if value is None else str(value)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as what is in them."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
