"""Counters and histograms as plain data, and the text that Prometheus reads. Knows no metric by name."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache

type Labels = tuple[str, ...]
type Counts = defaultdict[Labels, float]
type Plain = list[tuple[list[str], float]]  # counts as JSON carries them


class Histogram:
    """Observations by upper bound, which belongs to its bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one is beyond every bound
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def take(self) -> list[float]:
        """What was observed since the last time, for `add` of another one."""
        taken = [self.total, *self.counts]
        self.counts[:] = [0] * len(self.counts)
        self.total = 0.0
        return taken

    def add(self, taken: list[float]) -> None:
        """Count what another one with the same bounds took."""
        self.total += taken[0]
        self.counts = [int(mine + more) for mine, more in zip(self.counts, taken[1:], strict=True)]

    def text(self, name: str, labels: str = "") -> Iterator[str]:
        """Its lines; `labels` are written already."""
        seen, before = 0, f"{labels}," if labels else ""
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            yield f'{name}_bucket{{{before}le="{bound}"}} {seen}\n'
        after = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{after} {self.total}\n{name}_count{after} {seen}\n"


def take(counts: Counts) -> Plain:
    """What was counted since the last time, for `add` elsewhere."""
    taken = [(list(labels), count) for labels, count in counts.items()]
    counts.clear()
    return taken


def add(counts: Counts, taken: Iterable[tuple[Iterable[str], float]]) -> None:
    """Count what was taken elsewhere."""
    for labels, count in taken:
        counts[tuple(labels)] += count


def head(name: str, kind: str, text: str) -> str:
    """What stands before the series of a family."""
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def lines(name: str, names: Labels, counts: Counts, before: str = "") -> list[str]:
    """A line for each series; `before` are labels that are written already."""
    if not names:
        return [f"{name} {count}\n" for count in counts.values()]
    return [f"{name}{{{before}{written(names, values)}}} {count}\n" for values, count in counts.items()]


@lru_cache(maxsize=4096)  # hundreds of agents share a few sets of labels
def written(names: Labels, values: Labels) -> str:
    """Labels as the text format has them."""
    return ",".join(f'{name}="{escaped(value)}"' for name, value in zip(names, values, strict=True))


def escaped(value: str) -> str:
    """A label value as the text format wants it; a lone surrogate, which UTF-8 cannot carry, becomes `?`."""
    value = value.encode("utf-8", "replace").decode()
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
