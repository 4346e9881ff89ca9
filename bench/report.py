"""Tables of what was measured, on the terminal and in RESULTS.md, and the data of the plot."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from bench import machine
from bench.contestants import HERE, PEERS, PYTHON, TWO_WORKERS
from bench.measure import DIRECT
from bench.scenarios import SCENARIOS, UNITS, Scenario
from proxy import __version__

type Figures = dict[str, float]
type Results = dict[str, dict[str, Figures | str]]  # by scenario, by contestant; a text says why there are none

OURS = "sallyport-fast"
REVERSE = ("haproxy", "nginx")  # shown with a mark
INTRODUCTION = """\
# Results

Written by `./bench/run` on {date}; [README.md](README.md) tells how it measures. Figures are medians, and only ratios
within one table count. *x A* is how many times better a row is than A; *{ours} / it* how many times better
Sallyport's fast lane is than the row, beside the least it should be. CPU time is of the whole process tree.
{reverse} take TLS directly: they know no CONNECT, which spares them work.

{machine}. {versions}.
"""


def ratio(
    scenario: Scenario, ours: Figures | str | None, other: Figures | str | None, figure: str = ""
) -> float | None:
    """How many times better `ours` is, by the scenario's figure or another; None where that cannot be said."""
    figure = figure or scenario.figure
    if not isinstance(ours, dict) or not isinstance(other, dict):
        return None
    a, b = ours.get(figure, 0), other.get(figure, 0)
    if a <= 0 or b <= 0:
        return None
    return a / b if scenario.more_is_better else b / a


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _rows(scenario: Scenario, found: dict[str, Figures | str]) -> list[list[str]]:
    """A header and a line per contestant; a line of two is of one that failed."""
    table = [["", *(UNITS[name] for name in scenario.columns), f"x {scenario.against}", f"{OURS} / it", "target"]]
    for name, got in found.items():
        if isinstance(got, str):
            table.append([name, f"failed: {got}"])
        elif got:
            target = scenario.targets.get(name)
            table.append(
                [
                    name,
                    *(_number(got.get(column)) for column in scenario.columns),
                    _number(ratio(scenario, got, found.get(scenario.against))),
                    _number(ratio(scenario, found.get(OURS), got)) if name != OURS else "",
                    f">= {target:g}" if target else "",
                ]
            )
    return table


def _verdict(reached: bool, words: str) -> str:
    return f"{'reached' if reached else 'MISSED'}: {words}"


def _verdicts(scenario: Scenario, found: dict[str, Figures | str]) -> list[str]:
    """Which target is reached and which is not."""
    ours = found.get(OURS)
    said = []
    for name, target in scenario.targets.items():
        for figure in (scenario.figure, *scenario.also):
            if times := ratio(scenario, ours, found.get(name), figure):
                words = f"{times:.2f}x {name}, target {target:g}x ({UNITS[figure]})"
                said.append(_verdict(times >= target, words))
    for name, alone in TWO_WORKERS.items() if scenario.twice else ():
        if times := ratio(scenario, found.get(name), found.get(alone)):
            words = f"{name} {times:.2f}x {alone}, target {scenario.twice:g}x ({UNITS[scenario.figure]})"
            said.append(_verdict(times >= scenario.twice, words))
    for name, most in scenario.limits.items():
        if isinstance(ours, dict) and name in ours:
            said.append(_verdict(ours[name] <= most, f"{UNITS[name]} {_number(ours[name])}, at most {most:g}"))
    return said


def print_scenario(scenario: Scenario, found: dict[str, Figures | str]) -> None:
    """On the terminal."""
    table = _rows(scenario, found)
    widths = [max(len(row[i]) for row in table if len(row) == len(table[0])) for i in range(len(table[0]))]
    print(f"\n{scenario.title}")
    for name, *cells in table:
        if len(cells) == 1:
            print(f"  {name:<19}  {cells[0]}")
        else:
            padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            print(f"  {name:<19}  {'  '.join(padded)}")
    for line in [*_verdicts(scenario, found), *([scenario.note] if scenario.note else [])]:
        print(f"  {line}")


def _first(command: list[str | Path], pattern: str) -> Callable[[], str]:
    def read() -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(pattern, done.stdout + done.stderr)
        return found[1] if found else "?"

    return read


def _versions() -> str:
    """Of everything that took part and is there."""
    ask = {
        "Sallyport": lambda: __version__,
        "Python": _first([PYTHON, "--version"], r"Python (\S+)"),
        "mitmproxy": lambda: version("mitmproxy"),
        "OpenSSL": _first([PYTHON, "-c", "import ssl; print(ssl.OPENSSL_VERSION)"], r"OpenSSL (\S+)"),
        "Go": _first([PEERS / "go", "version"], r"go(\d\S+)"),
        "Envoy": _first([PEERS / "envoy", "--version"], r"/(\d+\.\d+\.\d+)/"),
        "squid": _first(["/usr/sbin/squid", "-v"], r"Version (\S+)"),
        "HAProxy": _first(["/usr/sbin/haproxy", "-v"], r"version (\d[\d.]*)"),
        "nginx": _first(["/usr/sbin/nginx", "-v"], r"nginx/(\S+)"),
        "proxy.py": _first([PEERS / "pip", "show", "proxy.py"], r"Version: (\S+)"),
    }
    found = []
    for name, read in ask.items():
        try:
            found.append(f"{name} {read()}")
        except OSError:
            continue
    return ", ".join(found)


def _markdown(scenario: Scenario, found: dict[str, Figures | str]) -> list[str]:
    header, *rows = _rows(scenario, found)
    lines = [f"## {scenario.title}", "", "| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for name, *cells in rows:
        shown = f"{name} (no CONNECT)" if name in REVERSE else f"**{name}**" if name == OURS else name
        cells += [""] * (len(header) - 1 - len(cells))
        lines.append(f"| {shown} | " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    lines += ["", *([scenario.note, ""] if scenario.note else [])]
    return lines + [f"- {verdict}" for verdict in _verdicts(scenario, found)] + [""]


def write_results(results: Results, date: datetime.date, *, quick: bool) -> None:
    """RESULTS.md, and the plot by the peers' interpreter, which has matplotlib."""
    text = INTRODUCTION.format(
        date=date, ours=OURS, reverse=" and ".join(REVERSE), machine=machine.description(), versions=_versions()
    )
    if quick:
        text += "\nA quick run: three repetitions of a second each, one of what takes long.\n"
    text += "\n![How many times as good as the fast lane each contestant is](results.svg)\n\n"
    text += "\n".join(line for name, found in results.items() for line in _markdown(SCENARIOS[name], found))
    (HERE / "RESULTS.md").write_text(text.rstrip() + "\n")
    shown: dict[str, dict[str, float]] = {}
    for name, found in results.items():
        panel = shown[SCENARIOS[name].title] = {}
        for who in found.keys() - {OURS, DIRECT}:
            if times := ratio(SCENARIOS[name], found[who], found.get(OURS)):
                panel[who] = times
    plot: list[str | Path] = [PEERS / "python", "-P", HERE / "plot.py", HERE / "results.svg"]
    done = subprocess.run(plot, input=json.dumps(shown), text=True, check=False)
    print(f"wrote {HERE.name}/RESULTS.md" + ("" if done.returncode else f" and {HERE.name}/results.svg"))
