"""Durations, sizes and rates as an operator writes them, in rules and in settings."""

from __future__ import annotations

import re
from fractions import Fraction

from proxy.yamltree import kind_of

_SECONDS = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600), "d": Fraction(86400)}
_BYTES: dict[str, int] = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


def parse_duration(text: object) -> float:
    """Seconds from `500ms`, `60s`, `5m`, `8h` or `2d`.

    Raises ValueError(message, hint).
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(ms|s|m|h|d)", text) if isinstance(text, str) else None
    if not match:
        shown = f'"{text}"' if isinstance(text, str) else kind_of(text)
        raise ValueError(f"expected a duration, got {shown}", 'write a number and a unit: "500ms", "60s", "5m", "8h"')
    return float(Fraction(match[1]) * _SECONDS[match[2]])


def parse_size(text: object) -> int:
    """Bytes from `64KiB`, `10MB` or a whole number of bytes.

    Raises ValueError(message, hint).
    """
    spelled = str(text) if isinstance(text, str | int) and not isinstance(text, bool) else ""
    match = re.fullmatch(r"([0-9]{1,15}) ?([A-Za-z]*)", spelled)
    if not match or match[2] not in _BYTES:
        shown = f'"{spelled}"' if spelled else kind_of(text)
        raise ValueError(f"expected a size, got {shown}", 'write "64KiB", "1MiB", "10MB" or a number of bytes')
    return int(match[1]) * _BYTES[match[2]]


def parse_rate(text: object) -> tuple[int, float]:
    """So many, and the seconds in which they may be, from `60/m`, `5/s` or `1000/h`.

    Raises ValueError(message, hint).
    """
    match = re.fullmatch(r"([1-9][0-9]{0,8}) ?/ ?(s|m|h|d)", text) if isinstance(text, str) else None
    if not match:
        shown = f'"{text}"' if isinstance(text, str) else kind_of(text)
        raise ValueError(f"expected a rate, got {shown}", 'write how many in a second, minute, hour or day: "60/m"')
    return int(match[1]), float(_SECONDS[match[2]])
