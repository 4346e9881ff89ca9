"""How long rules take to load, and whether a decision costs more among many of them.

Run it from the root of the repository: `python -m bench.rules`.
"""

from __future__ import annotations

import statistics
import time

from proxy.agent import Agent, AgentState
from proxy.policy import Policy, decide
from proxy.rulefile import load_policy
from proxy.url import parse_url

SIZES = (10, 1_000, 10_000)
AGENT = Agent("coder-1", {"team": "payments"}, state=AgentState.ACTIVE)
URLS = {
    "allowed": "https://api.shared.test/repos/acme/widgets/issues?state=open",
    "blocked": "https://api.shared.test/repos/acme/widgets/secrets",
    "no rule": "https://unknown.test/",
}
_FEW = """
  - name: shared-read
    agents: ["coder-*"]
    match: {host: api.shared.test, method: [GET], path: /repos/acme/**, query: {state: [open, closed]}}
    action: allow
    inject: [{credential: shared, as: bearer}]
  - name: shared-secrets
    match: {host: "**.shared.test", path: "/**/secrets"}
    action: block
"""


def rules(count: int) -> bytes:
    """A file of `count` rules, of which two name the host that is asked for."""
    others = (
        f"""
  - name: rule-{number}
    agents: ["team-{number % 50}-*"]
    match:
      host: [api-{number}.example.com, "*.svc-{number}.example.com"]
      method: [GET, POST]
      path: /v1/tenants/{number}/**
    action: allow
    inject:
      - {{credential: key-{number % 100}, as: header, name: x-api-key}}"""
        for number in range(count - 2)
    )
    return f"version: 1\nrules:{''.join(others)}{_FEW}".encode()


def decision(policy: Policy, url: str) -> float:
    """The median time of a decision, in seconds."""
    view = parse_url("GET", url)
    times = []
    for _ in range(200):
        started = time.perf_counter()
        for _ in range(50):
            decide(policy, AGENT, view)
        times.append((time.perf_counter() - started) / 50)
    return statistics.median(times)


def main() -> None:
    """Print the figures, and how they grow from the smallest number of rules."""
    print(f"{'rules':>6}  {'load':>8}" + "".join(f"  {name:>16}" for name in URLS))
    first: dict[str, float] = {}
    for count in SIZES:
        content = rules(count)
        started = time.perf_counter()
        policy, _ = load_policy({"bench.yaml": content})
        loaded = time.perf_counter() - started
        cells = []
        for name, url in URLS.items():
            seconds = decision(policy, url)
            cells.append(f"  {seconds * 1e6:6.2f} us x{seconds / first.setdefault(name, seconds):5.2f}")
        print(f"{count:>6}  {loaded:6.3f} s" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
