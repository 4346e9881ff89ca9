"""`./bench/profile`: Sallyport under load and py-spy beside it; prints the functions that take the most."""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from bench import machine
from bench.contestants import PEERS
from bench.main import build_tools, upstream
from bench.measure import Contestant, generator
from bench.scenarios import SCENARIOS


def count(stacks: str) -> tuple[collections.Counter[str], collections.Counter[str], int]:
    """Samples of the main thread by function, those where it was on top and those where it was anywhere, and all."""
    own: collections.Counter[str] = collections.Counter()
    under: collections.Counter[str] = collections.Counter()
    for line in stacks.splitlines():
        stack, _, times = line.rpartition(" ")
        frames = stack.split(";")
        if not any("__main__.py" in frame for frame in frames):
            continue  # a thread that waits looks busy to py-spy
        own[frames[-1]] += int(times)
        for frame in set(frames):
            under[frame] += int(times)
    return own, under, own.total()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="bench/profile", description=__doc__)
    parser.add_argument("--contestant", default="sallyport-fast", choices=["sallyport-fast", "sallyport-mitmproxy"])
    parser.add_argument(
        "--scenario", default="keepalive", choices=[s.name for s in SCENARIOS.values() if s.kind == "load"]
    )
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--lines", type=int, default=40, help="how many functions")
    parser.add_argument("--native", action="store_true", help="C functions too; slows it down")
    parser.add_argument("--raw", type=Path, help="keep the folded stacks here, for a flame graph")
    arguments = parser.parse_args()
    build_tools()
    scenario = SCENARIOS[arguments.scenario]
    told = {name: value for name, value in scenario.site.items() if name != "two_cores"}
    proxy_cores, other_cores = machine.cores()
    with upstream(False, other_cores) as site:
        contestant = Contestant(arguments.contestant, replace(site, **told))
        try:
            contestant.start(proxy_cores, other_cores)
            raw = arguments.raw or site.folder / "stacks"
            options = [*contestant.hosts(), *scenario.load, "-s", str(arguments.seconds + 2)]
            with generator(contestant, options, other_cores) as process:
                before = machine.cpu_by_thread(contestant.root)
                assert process.stdin
                process.stdin.write("go\n")
                process.stdin.flush()
                spy = [PEERS / "py-spy", "record", "--pid", str(contestant.root), "--duration", str(arguments.seconds)]
                spy += ["--rate", "500", "--function", "--format", "raw", "--output", str(raw)]
                spy += ["--native"] if arguments.native else []
                done = subprocess.run(spy, capture_output=True, text=True, check=False)
                threads = machine.cpu_by_thread(contestant.root)
            if done.returncode:
                sys.exit(f"py-spy: {done.stderr.strip()}")
            own, under, total = count(raw.read_text())
        finally:
            contestant.stop()
    print(f"{contestant.name}: {scenario.title}\n\nseconds of CPU by thread")
    for name, used in sorted(threads.items(), key=lambda item: before.get(item[0], 0) - item[1])[:6]:
        print(f"  {used - before.get(name, 0):5.2f}  {name}")
    print(f"\n{total} samples of the main thread; per cent of them")
    for words, counted in (("in the function itself", own), ("in it and what it calls", under)):
        print(f"\n{words}")
        for frame, times in [item for item in counted.most_common() if item[1] < total][: arguments.lines]:
            print(f"  {100 * times / total:5.1f}  {frame}")


if __name__ == "__main__":
    main()
