"""The dashboard and the alerts speak of metrics that exist, in PromQL that a real Prometheus answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from proxy.admin import Admin, Status
from proxy.agent import Agent
from proxy.exchange import Exchange, Injected
from proxy.metrics import Metrics
from proxy.reason import Reason

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/sallyport.json").read_text())
VARIABLES = {"$__rate_interval": "5s", "$__range": "1m", "$agent": ".*"}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


def panel_targets() -> Iterator[tuple[str, str, str]]:
    """Title, query as Grafana would send it, and legend of everything that is drawn."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            yield panel["title"], query, target["legendFormat"]


def panel_queries() -> Iterator[tuple[str, str]]:
    for title, query, _ in panel_targets():
        yield title, query


def alert_queries() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def busy_metrics() -> Metrics:
    """Every family with a series in it."""
    metrics = Metrics()
    metrics.watch(lambda: {"active": 2, "killed": 1}, lambda: True)
    metrics.reloaded(True, 12, 1_700_000_000.0)
    metrics.connection("127.0.0.1:8080", +1)
    metrics.watch_processes(lambda: {"1": os.getpid()})
    return metrics


def count_everything(metrics: Metrics) -> None:
    """One of everything that can be counted."""
    agent = Agent("coder-1")
    metrics.record(
        Exchange(
            id="1",
            time=0.0,
            listener="127.0.0.1:8080",
            client="127.0.0.1:50000",
            agent=agent,
            allowed=True,
            reason=Reason.ALLOWED,
            identity=("token",),
            rule="github-read",
            injected=[Injected("github", 1, "header:authorization")],
            redacted=Counter({("github", "body"): 1}),
            leak=("canary", "trap", "body"),
            request_bytes=10,
            response_bytes=20,
            duration=0.02,
            decision_duration=0.0001,
            upstream_duration=0.01,
        )
    )
    metrics.record(
        Exchange(id="2", time=0.0, listener="", client="", agent=agent, reason=Reason.NO_RULE, decision_duration=0.0001)
    )
    metrics.limit_exceeded("coder-1", "github-read", "rate")
    metrics.certificate_minted()
    metrics.vault_operation("open", "ok")
    metrics.audit_dropped(1)
    metrics.worker_restarted(1)


def exposed_names() -> set[str]:
    """The names of all samples there can be."""
    types = re.findall(r"^# TYPE (\S+) (\S+)$", busy_metrics().exposition().decode(), re.MULTILINE)
    return {name + suffix for name, kind in types for suffix in SUFFIXES.get(kind, ("",))}


@pytest.mark.parametrize(("title", "query"), [*panel_queries(), *alert_queries()])
def test_every_metric_that_is_asked_for_exists(title: str, query: str) -> None:
    names = set(re.findall(r"\b(?:sallyport|process)_\w+", query))
    assert names <= exposed_names()
    assert names or title in ("Proxy", "SallyportDown")  # they ask for `up`


def test_every_metric_is_shown_somewhere() -> None:
    shown = set(re.findall(r"\bsallyport_\w+", " ".join(query for _, query in panel_queries())))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in exposed_names() if name.startswith("sallyport_")}
    assert families <= {re.sub("_bucket$", "", name) for name in shown}


def test_panels_do_not_overlap() -> None:
    """Grafana moves overlapping panels about, differently in each version."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_dashboard_is_the_one_that_is_provisioned() -> None:
    """The data source it picks by default and the folder it lies in are those of the provisioning files."""
    provisioning = ROOT / "deploy/grafana/provisioning"
    source = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"][0]
    provider = yaml.safe_load((provisioning / "dashboards/sallyport.yml").read_text())["providers"][0]
    assert (DASHBOARD["uid"], DASHBOARD["title"]) == ("sallyport", "Sallyport")
    assert (source["type"], source["isDefault"]) == (DASHBOARD["templating"]["list"][0]["query"], True)
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"query:{n}", "expr": query} for n, (_, query) in enumerate(panel_queries())]
    file = tmp_path / "panels.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", file)
    promtool("check", "config", ROOT / "deploy/prometheus/prometheus.yml")


@pytest.mark.slow
def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", Path(__file__).with_name("alerts.test.yml"))


@pytest.mark.slow
def test_every_panel_shows_something(tmp_path: Path) -> None:
    """A label that does not exist parses well, and shows an empty panel or legend."""
    asyncio.run(_watch_panels_fill(tmp_path))


async def _watch_panels_fill(folder: Path) -> None:
    metrics = busy_metrics()
    admin = await Admin.start("127.0.0.1", 0, metrics, Status)
    prometheus, address = await _start_prometheus(folder, admin.port)
    try:
        waiting = list(panel_targets())
        async with asyncio.timeout(30):
            while waiting:
                count_everything(metrics)
                waiting = [target for target in waiting if not await asyncio.to_thread(_filled, address, *target)]
    except TimeoutError:
        pytest.fail(f"stayed empty: {waiting}")
    finally:
        prometheus.kill()
        await prometheus.communicate()
        await admin.stop()


async def _start_prometheus(folder: Path, target: int) -> tuple[asyncio.subprocess.Process, str]:
    """A Prometheus on a port of the kernel's choice, scraping `target` as fast as it will."""
    job = {"job_name": "sallyport", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
    config = folder / "prometheus.yml"
    pace = {"scrape_interval": "200ms", "scrape_timeout": "200ms"}
    config.write_text(json.dumps({"global": pace, "scrape_configs": [job]}))
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr
    async for line in process.stderr:
        if found := re.search(rb'"?Listening on"? address=(\S+)', line):
            return process, found[1].decode()
    pytest.fail("prometheus ended before it listened")


def _filled(address: str, _title: str, query: str, legend: str) -> bool:
    """Whether Prometheus has an answer now, with the labels that the legend names; a quantile of nothing is NaN."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url) as answer:
            found = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        if error.code != 503:  # it listens before it is ready
            raise
        return False
    labels = set(re.findall(r"{{(\w+)}}", legend))
    return any(series["value"][1] != "NaN" and labels <= series["metric"].keys() for series in found)
