"""`sallyport doctor`: whether a sandbox's clients work, and whether there is a way round the proxy. Run inside it.

Needs nothing but Python and this package, and no proxy's files.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from proxy.doctorclients import try_clients
from proxy.doctorways import Check, through_the_proxy, ways_round

_SIGNS = {True: ("ok", "32"), False: ("FAIL", "31"), None: ("-", "33")}  # SGR colours, ECMA-48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `doctor`."""
    parser.add_argument("--agent", metavar="ID", help="who the sandbox should be")
    parser.add_argument("--json", action="store_true", help="print data as JSON")


def main(argv: Sequence[str]) -> int:
    """`sallyport doctor` without the rest of `sallyport`; the exit status."""
    parser = argparse.ArgumentParser(prog="sallyport doctor", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; 0 only if none is bad."""
    groups = {
        "proxy": through_the_proxy(os.environ, arguments.agent),
        "ways round": ways_round(),
        "clients": try_clients(os.environ),
    }
    good = all(check.ok is not False for checks in groups.values() for check in checks)
    if arguments.json:
        found = [{"group": group, **asdict(check)} for group, checks in groups.items() for check in checks]
        print(json.dumps({"ok": good, "checks": found}))
    else:
        print("\n".join(_lines(groups, sys.stdout.isatty() and "NO_COLOR" not in os.environ)))
    return 0 if good else 1


def _lines(groups: dict[str, list[Check]], colours: bool) -> list[str]:
    lines = []
    for group, checks in groups.items():
        lines.append(group.upper())
        for check in checks:
            word, colour = _SIGNS[check.ok]
            sign = f"\x1b[{colour}m{word:4}\x1b[0m" if colours else f"{word:4}"
            lines.append(f"  {sign}  {check.name:15}  {check.detail}")
            if check.fix:
                lines.append(f"        {'':15}  fix: {check.fix}")
    return lines
