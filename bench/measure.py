"""One measurement of one contestant: the generator runs, the kernel is asked before and after."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path

from bench import machine
from bench.contestants import CONTESTANTS, Launch, Site
from bench.scenarios import BULK, Scenario

DIRECT = "direct"  # no proxy: what the generator and the upstream can do by themselves


class Failed(Exception):
    """The contestant does not do the work."""


class Contestant:
    """One of them, running. `values` has a list per figure, one value per repetition."""

    def __init__(self, name: str, site: Site) -> None:
        self.name = name
        self.site = replace(site, folder=site.folder / name)
        self.process: subprocess.Popen[str] | None = None
        self.launch: Launch | None = None
        self.problem = ""
        self.values: dict[str, list[float]] = {}
        self.next_host = 0
        self.options = ["-t", str(site.upstream)]
        self._log = self.site.folder / "log"

    @property
    def root(self) -> int:
        """Of its process tree."""
        assert self.process
        return self.process.pid

    def start(self, on: set[int], others: set[int]) -> None:
        """Configure and start it, and see that it does the work.

        Raises Failed.
        """
        self.site.folder.mkdir()
        if self.name == DIRECT:
            self.options += ["-C", f"Bearer {self.site.credential}", "-a", str(self.site.keys / "origin-ca.pem")]
        else:
            self._launch(on)
        self._prove(others)

    def _launch(self, on: set[int]) -> None:
        self.launch = launch = CONTESTANTS[self.name](self.site)
        env = {name: value for name, value in os.environ.items() if not name.startswith("SALLYPORT_")}
        with self._log.open("w") as log:
            self.process = machine.start(
                launch.command,
                on,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if launch.listening else log,
                stderr=log,
                cwd=self.site.folder,
                env={**env, **launch.env},
            )
        if launch.listening:
            assert self.process.stdout
            if not self.process.stdout.readline():
                raise Failed("it did not start")
            launch.port = launch.listening()
        machine.wait_for_port(launch.port, self.process)
        self.options += ["-p", str(launch.port), "-a", str(launch.ca)] + (["-R"] if launch.reverse else [])
        if launch.after:
            agents = self.site.folder / "agents"
            agents.write_text("".join(f"{proof}\n" for proof in reversed(launch.after())))
            self.options += ["-A", str(agents)]

    def _prove(self, others: set[int]) -> None:
        """One request, until it knows its agents: the last one that was made asks first."""
        deadline = time.monotonic() + 5
        while True:
            try:
                with generator(self, ["-c", "1", "-w", "0", "-s", "0"], others):
                    return
            except Failed:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def hosts(self) -> list[str]:
        """The generator's options for names that were not asked for yet."""
        return ["-f", str(self.next_host), "-m", str(self.site.hosts)] if self.site.hosts else []

    def fail(self, error: Exception) -> None:
        """It is out: whoever does not do the work is not fast."""
        tail = self._log.read_text().strip().splitlines()[-1:] if self._log.exists() else []
        self.problem = " | ".join([str(error), *tail])

    def stop(self) -> None:
        """Let it end."""
        if self.process:
            machine.stop(self.process)


@contextmanager
def generator(contestant: Contestant, options: list[str], on: set[int]) -> Iterator[subprocess.Popen[str]]:
    """The generator, warmed up.

    Raises Failed when it does not get that far.
    """
    command = [str(contestant.site.build / "load"), *contestant.options, *options]
    process = machine.start(command, on, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout
        assert process.stderr
        if process.stdout.readline() != "ready\n":
            raise Failed(process.stderr.read().strip() or "the generator ended")
        yield process
    finally:
        process.kill()
        process.communicate()


def measure(contestant: Contestant, scenario: Scenario, seconds: float, on: set[int]) -> dict[str, float]:
    """One repetition; a value for each figure.

    Raises Failed when a single answer was not 2xx.
    """
    if contestant.launch and not machine.tree_runs(contestant.root):
        raise Failed("it ended")
    return {"load": _load, "idle": _idle, "h2": _http2, "fairness": _fairness}[scenario.kind](
        contestant, scenario, seconds, on
    )


def _load(contestant: Contestant, scenario: Scenario, seconds: float, on: set[int]) -> dict[str, float]:
    options = ["-s", str(seconds), *scenario.load, *contestant.hosts()]
    root = contestant.root if contestant.launch else 0
    with generator(contestant, options, on) as process:
        if root:
            machine.forget_peak(root)
            resident, before = machine.rss(root), machine.cpu_seconds(root)
        said, _ = process.communicate("go\n")
        if root:
            cpu, peak = machine.cpu_seconds(root) - before, machine.peak(root)
    result = json.loads(said)
    done = result["requests"]
    if result["refused"] or result["failed"] or not done:
        raise Failed(f"{result['refused']} answers not 2xx, {result['failed']} requests failed, {done} answered")
    contestant.next_host = int(result["next_host"])
    values = {
        "rps": done / result["seconds"],
        "mib_s": done * BULK / 2**20 / result["seconds"],
        "p50_us": result["latency"]["p50"],
        "p99_us": result["latency"]["p99"],
        "first_us": result["first_byte"]["p50"],
        "event_p50_us": result["event_delay"]["p50"],
        "event_p99_us": result["event_delay"]["p99"],
    }
    if root:
        values |= {"cpu_us": cpu / done * 1e6, "cpu_s_gib": cpu / (done * BULK / 2**30)}
        values |= {"rss_mib": machine.rss(root) / 2**20, "growth_mib": (peak - resident) / 2**20}
    return values


def _fairness(contestant: Contestant, _scenario: Scenario, seconds: float, on: set[int]) -> dict[str, float]:
    """The p99 of one agent alone, and while another one asks as fast as it is answered."""
    if not contestant.launch:
        return {}
    proofs = (contestant.site.folder / "agents").read_text().splitlines(keepends=True)
    for name, proof in zip(("calm", "flood"), proofs, strict=True):
        (contestant.site.folder / name).write_text(proof)
    at = contestant.options.index("-A")
    alone = [*contestant.options[:at], *contestant.options[at + 2 :]]
    calm = _asked_with(contestant, [*alone, "-A", str(contestant.site.folder / "calm")])
    flood = _asked_with(contestant, [*alone, "-A", str(contestant.site.folder / "flood")])
    options = ["-s", str(seconds), "-c", "4", "-r", "100"]
    quiet = _p99(calm, options, on)
    with generator(flood, ["-s", str(seconds + 2), "-c", "64"], on) as process:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
        flooded = _p99(calm, options, on)
    return {"p99_us": quiet, "flooded_p99_us": flooded, "p99_times": flooded / quiet}


def _asked_with(contestant: Contestant, options: list[str]) -> Contestant:
    """The same one as another agent asks it."""
    other = copy(contestant)
    other.options = options
    return other


def _p99(contestant: Contestant, options: list[str], on: set[int]) -> float:
    with generator(contestant, options, on) as process:
        said, _ = process.communicate("go\n")
    result = json.loads(said)
    if result["refused"] or result["failed"] or not result["requests"]:
        raise Failed(f"{result['refused']} answers not 2xx, {result['failed']} requests failed")
    return float(result["latency"]["p99"])


def _idle(contestant: Contestant, scenario: Scenario, _seconds: float, on: set[int]) -> dict[str, float]:
    count = int(scenario.load[scenario.load.index("-c") + 1])
    if not contestant.launch:
        return {}
    with generator(contestant, ["-s", "0"], on):
        pass
    before = machine.rss(contestant.root)
    with generator(contestant, list(scenario.load), on) as process:
        time.sleep(1)  # buffers are given back
        held = machine.rss(contestant.root)
        still_open = int(process.communicate("go\n")[0])
    if still_open != count:
        raise Failed(f"{still_open} of {count} connections are still open")
    return {"kib_connection": (held - before) / 1024 / count, "rss_mib": held / 2**20}


def _http2(contestant: Contestant, _scenario: Scenario, seconds: float, on: set[int]) -> dict[str, float]:
    """By h2load, which cannot CONNECT: a tunnel does that for it."""
    if not contestant.launch:
        return {}
    h2load = shutil.which("h2load")
    if not h2load:
        raise Failed("h2load is not installed")
    target = f"api.bench.test:{contestant.site.upstream}"
    with _tunnel(contestant, target, on) as port:
        command = [
            h2load,
            "-c4",
            "-m8",
            "--npn-list=h2",
            f"--connect-to=127.0.0.1:{port}",
            f"https://{target}/v1/models",
        ]
        rate = _h2load([*command, "-n200"], on)[1]
        before = machine.cpu_seconds(contestant.root)
        done, rate = _h2load([*command, f"-n{max(200, int(rate * seconds))}"], on)
        return {"rps": rate, "cpu_us": (machine.cpu_seconds(contestant.root) - before) / done * 1e6}


def _h2load(command: list[str], on: set[int]) -> tuple[int, float]:
    process = machine.start(command, on, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said, _ = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        raise Failed("h2load: no answer in 30 s") from None
    finally:
        process.kill()
    rate = re.search(r"finished in .*, ([\d.]+) req/s", said)
    done = re.search(r"requests: (\d+) total", said)
    good = re.search(r"status codes: (\d+) 2xx", said)
    if not rate or not done or not good or good[1] != done[1] or "Application protocol: h2" not in said:
        raise Failed(f"h2load: {good[1] if good else 0} of {done[1] if done else 0} answers 2xx by HTTP/2")
    return int(done[1]), float(rate[1])


@contextmanager
def _tunnel(contestant: Contestant, target: str, on: set[int]) -> Iterator[int]:
    assert contestant.launch
    if contestant.launch.reverse:
        yield contestant.launch.port
        return
    agents: Path = contestant.site.folder / "agents"
    proof = agents.read_text().split("\n")[0] if agents.exists() else ""
    command = [str(contestant.site.build / "tunnel"), str(contestant.launch.port), target, proof]
    process = machine.start(command, on, stdout=subprocess.PIPE)
    try:
        assert process.stdout
        yield int(process.stdout.readline())
    finally:
        machine.stop(process)
