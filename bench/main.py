"""`./bench/run`: starts the contestants, measures them in turns, prints and writes what came out."""

from __future__ import annotations

import argparse
import datetime
import secrets
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from bench import machine
from bench.certificates import make_pair
from bench.contestants import CONTESTANTS, HERE, ROOT, TWO_WORKERS, Site
from bench.measure import DIRECT, Contestant, Failed, measure
from bench.report import Figures, Results, print_scenario, write_results
from bench.scenarios import SCENARIOS, Scenario

BUILD = ROOT / ".venv-peers" / "build"


def build_tools() -> None:
    """Compile what is in C where its source is newer."""
    BUILD.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in (HERE / "c").iterdir())
    for source in (HERE / "c").glob("*.c"):
        program = BUILD / source.stem
        if not program.exists() or program.stat().st_mtime < newest:
            subprocess.run(["cc", "-O2", "-o", program, source, "-lssl", "-lcrypto"], check=True)


@contextmanager
def upstream(distrust: bool, on: set[int]) -> Iterator[Site]:
    """The origin, and what contestants are told of it; with `distrust` they are told to trust a stranger's CA."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        folder.chmod(0o755)  # squid gives up being root
        for pair in ("proxy", "origin", "stranger"):
            make_pair(folder, pair)
        shutil.copy(folder / f"{'stranger' if distrust else 'origin'}-ca.pem", folder / "upstream-ca.pem")
        credential = secrets.token_urlsafe(24)
        command = [BUILD / "upstream", folder / "origin.pem", folder / "origin.key", f"Bearer {credential}"]
        process = machine.start(command, on, stdout=subprocess.PIPE)
        try:
            assert process.stdout
            yield Site(folder, folder, BUILD, int(process.stdout.readline()), credential)
        finally:
            machine.stop(process)


def compare(scenario: Scenario, names: list[str], *, quick: bool, distrust: bool) -> list[Contestant]:
    """All contestants, repetition by repetition, each round in another order."""
    told = dict(scenario.site)
    proxy_cores, other_cores = machine.two_cores() if told.pop("two_cores", False) else machine.cores()
    repetitions, seconds = (3, min(scenario.seconds, 1.0)) if quick else (5, scenario.seconds)
    if scenario.kind == "idle":
        repetitions = 1
        load = tuple("500" if quick and word == "5000" else word for word in scenario.load)
        scenario = replace(scenario, load=load)
    if "-n" in scenario.load:  # a number of requests, however long they take
        repetitions, seconds = (1 if quick else 3), scenario.seconds
    with upstream(distrust, other_cores) as site:
        contestants = [Contestant(name, replace(site, **told)) for name in (DIRECT, *names)]
        try:
            for contestant in contestants:
                try:
                    contestant.start(proxy_cores, other_cores)
                except (Failed, RuntimeError, OSError, subprocess.SubprocessError) as error:
                    contestant.fail(error)
            for repetition in range(repetitions):
                turn = repetition % len(contestants)
                for contestant in contestants[turn:] + contestants[:turn]:
                    _measure(contestant, scenario, seconds, other_cores)
        finally:
            for contestant in contestants:
                contestant.stop()
    return contestants


def _measure(contestant: Contestant, scenario: Scenario, seconds: float, on: set[int]) -> None:
    if contestant.problem:
        return
    try:
        values = measure(contestant, scenario, seconds, on)
    except Failed as error:
        contestant.fail(error)
        return
    for name, value in values.items():
        contestant.values.setdefault(name, []).append(value)


def figures(contestant: Contestant, direct: Contestant) -> Figures | str:
    """The medians; those of latencies also as what is added to going direct, round by round."""
    if contestant.problem:
        return contestant.problem
    found = {name: statistics.median(values) for name, values in contestant.values.items()}
    if contestant is not direct:
        for name in ("p50_us", "p99_us", "first_us", "event_p50_us", "event_p99_us"):
            rounds = zip(contestant.values.get(name, ()), direct.values.get(name, ()), strict=False)
            if added := [mine - base for mine, base in rounds]:
                found[f"{name.removesuffix('_us')}_added_us"] = statistics.median(added)
    return found


def chosen(scenario: Scenario, names: list[str]) -> list[str]:
    """Who takes part; with two workers only who is named."""
    able = scenario.only or [name for name in CONTESTANTS if name not in (*scenario.without, *TWO_WORKERS)]
    return [name for name in names if name in able]


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short repetitions; prints, writes nothing")
    parser.add_argument("--write", action="store_true", help="write the results of a quick run too")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="SCENARIO",
                        help=", ".join(SCENARIOS))  # fmt: skip
    parser.add_argument("--contestants", type=lambda text: text.split(","), default=list(CONTESTANTS), metavar="A,B",
                        help=", ".join(CONTESTANTS))  # fmt: skip
    parser.add_argument("--distrust", action="store_true",
                        help="tell them to trust another CA than the upstream's: all must fail")  # fmt: skip
    arguments = parser.parse_args()
    if unknown := set(arguments.contestants) - set(CONTESTANTS):
        parser.error(f"no such contestant: {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}")
    build_tools()
    results: Results = {}
    started = time.monotonic()
    for name in arguments.only:
        scenario, names = SCENARIOS[name], chosen(SCENARIOS[name], arguments.contestants)
        with machine.awake() if scenario.awake else nullcontext() as awake:
            direct, *others = compare(scenario, names, quick=arguments.quick, distrust=arguments.distrust)
        results[name] = {each.name: figures(each, direct) for each in (direct, *others)}
        told = [scenario.note] if scenario.note else []
        if scenario.awake:
            told.append(
                "Idle cores were kept from halting." if awake else "Idle cores could halt, which latencies show."
            )
        if scenario.twice:
            told.append(f"Two busy cores of this machine do {machine.second_core():.2f} times the work of one.")
        SCENARIOS[name] = replace(scenario, note=" ".join(told))
        print_scenario(SCENARIOS[name], results[name])
    print(f"\n{time.monotonic() - started:.0f} s")
    if arguments.write or not (arguments.quick or arguments.distrust):
        write_results(results, datetime.datetime.now(datetime.UTC).date(), quick=arguments.quick)


if __name__ == "__main__":
    main()
