"""What is measured: the load of each scenario, which figure counts, and what is to be reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

BULK = 100 << 20
NO_MINTING = ("envoy", "haproxy", "nginx")  # they have one certificate made before


@dataclass(frozen=True, slots=True)
class Scenario:
    """`load`: the generator's options beyond where to and how long. `figure`: what ratios are of, less is better
    unless `more_is_better`. `targets`: least ratio of Sallyport's fast lane to a contestant; `limits`: most of its own
    figures. `also`: figures that the targets hold for too. `twice`: least ratio of two workers to one. `awake`: idle
    cores must not halt meanwhile.
    """

    name: str
    title: str
    figure: str
    columns: tuple[str, ...]
    load: tuple[str, ...] = ()
    kind: Literal["load", "idle", "h2", "fairness"] = "load"
    seconds: float = 3.0
    more_is_better: bool = False
    also: tuple[str, ...] = ()
    against: str = "mitmdump"
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    site: Mapping[str, int | bool] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    twice: float = 0.0
    awake: bool = False
    note: str = ""


_REQUESTS = ("cpu_us", "rps", "p50_us", "p99_us")
_SMALL = {"mitmdump": 15, "envoy": 1.0, "squid": 1.0, "go": 0.6}
_BULK = ("cpu_s_gib", "mib_s", "growth_mib")

_ALL = (
    Scenario(
        "keepalive",
        "Keep-alive, small GET, 16 connections",
        "cpu_us",
        _REQUESTS,
        targets=_SMALL,
        note="All ask for the same: Sallyport decides it once, and again when something has changed.",
    ),
    Scenario(
        "varied",
        "The same, each time for another path: the rules are asked anew",
        "cpu_us",
        _REQUESTS,
        ("-v",),
        targets=_SMALL,
    ),
    Scenario(
        "post",
        "Keep-alive, POST of 2 KiB, 16 connections",
        "cpu_us",
        _REQUESTS,
        ("-b", "2048"),
    ),
    Scenario(
        "newconn",
        "A new connection for each request",
        "cpu_us",
        _REQUESTS,
        ("-k", "1"),
        targets={"mitmdump": 8, "envoy": 1.2, "go": 0.55},
    ),
    Scenario(
        "newhost",
        "A new host name for each request: a certificate minted each time",
        "cpu_us",
        (*_REQUESTS, "rss_mib"),
        ("-k", "1", "-h", "h%d.bench.test"),
        without=NO_MINTING,
        site={"hosts": 20_000},
        targets={"mitmdump": 3, "squid": 1.2},
    ),
    Scenario(
        "download",
        "100 MiB down, 4 at once",
        "cpu_s_gib",
        _BULK,
        ("-u", f"/bytes/{BULK}", "-c", "4", "-w", "0", "-n", "4"),
        seconds=20,
        site={"streaming": True},
        targets={"mitmdump": 1.5, "go": 0.8},
        limits={"growth_mib": 4},
    ),
    Scenario(
        "upload",
        "100 MiB up, 4 at once",
        "cpu_s_gib",
        _BULK,
        ("-b", str(BULK), "-c", "4", "-w", "0", "-n", "4"),
        seconds=20,
        site={"streaming": True},
        limits={"growth_mib": 4},
    ),
    Scenario(
        "sse",
        "Server-sent events, 4 streams of 100 a second",
        "event_p50_added_us",
        ("first_added_us", "event_p50_added_us", "event_p99_added_us", "first_us", "event_p50_us", "event_p99_us"),
        ("-u", "/sse/50/10000", "-c", "4"),
        awake=True,
        limits={"first_added_us": 500, "event_p50_added_us": 200, "event_p99_added_us": 3000},
        note="Added: beyond what it takes without a proxy, in the same round.",
    ),
    Scenario(
        "rate",
        "100 requests/s, latency from when each was due",
        "p50_added_us",
        ("p50_added_us", "p99_added_us", "p50_us", "p99_us", "cpu_us"),
        ("-r", "100"),
        seconds=8,
        also=("p99_added_us",),
        awake=True,
        targets={"mitmdump": 4, "envoy": 1.0},
        note="Added: beyond what it takes without a proxy, in the same round. Ratios are of the added p50.",
    ),
    Scenario(
        "idle",
        "Idle TLS connections (5,000; 500 when quick), each after one request",
        "kib_connection",
        ("kib_connection", "rss_mib"),
        ("-c", "5000", "-w", "0", "-s", "0"),
        kind="idle",
        targets={"mitmdump": 5, "envoy": 2},
        limits={"kib_connection": 20},
    ),
    Scenario(
        "agents",
        "1,000 agents, 1,000 rules, 20 requests a connection, 64 connections",
        "cpu_us",
        (*_REQUESTS, "rss_mib"),
        ("-c", "64", "-k", "20"),
        only=("sallyport-fast", "sallyport-mitmproxy", "mitmdump", "go", "envoy"),
        site={"agents": 1000},
        note="Only Sallyport knows agents and rules; the others do no more than elsewhere.",
    ),
    Scenario(
        "fairness",
        "100 requests/s of one agent, alone and while another one floods by 64 connections",
        "p99_times",
        ("p99_times", "p99_us", "flooded_p99_us"),
        kind="fairness",
        awake=True,
        seconds=4,
        only=("sallyport-fast", "sallyport-mitmproxy"),
        site={"agents": 2},
        limits={"p99_times": 3},
    ),
    Scenario(
        "http2",
        "HTTP/2 clients, 4 connections of 8 streams, HTTP/1.1 upstream",
        "cpu_us",
        ("cpu_us", "rps"),
        kind="h2",
        site={"http2": True},
        without=("squid", "proxy.py"),
        targets={"mitmdump": 1.5},
    ),
    Scenario(
        "workers",
        "Two workers beside one",
        "rps",
        ("rps", "cpu_us", "p50_us", "p99_us"),
        more_is_better=True,
        against="sallyport-fast",
        only=("sallyport-fast", "sallyport-fast-2", "sallyport-mitmproxy", "sallyport-mitmproxy-2"),
        site={"two_cores": True},
        twice=1.8,
        note="With fewer than four cores the generator and the upstream take their share of the two: a third of what "
        "the fast lane takes for a request, so that its requests/s cannot double, but little beside mitmproxy's stack.",
    ),
)
SCENARIOS = {scenario.name: scenario for scenario in _ALL}

UNITS = {
    "cpu_us": "CPU us/request",
    "p99_times": "p99 flooded / alone",
    "flooded_p99_us": "flooded p99 us",
    "rps": "requests/s",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "p50_added_us": "p50 added us",
    "p99_added_us": "p99 added us",
    "rss_mib": "RSS MiB",
    "cpu_s_gib": "CPU s/GiB",
    "mib_s": "MiB/s",
    "growth_mib": "RSS growth MiB",
    "first_us": "first byte us",
    "event_p50_us": "event p50 us",
    "event_p99_us": "event p99 us",
    "first_added_us": "first byte added us",
    "event_p50_added_us": "event p50 added us",
    "event_p99_added_us": "event p99 added us",
    "kib_connection": "KiB/connection",
}
