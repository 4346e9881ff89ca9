"""The admin endpoint, over real HTTP."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy import admin
from proxy.admin import Admin, Status
from proxy.metrics import Metrics
from proxy.problem import UserError

READY = Status(
    version="0.1.0",
    uptime=12.5,
    policy="sha256:ab",
    rules=3,
    agents=Counter(active=2, killed=0),
    store_up=True,
    audit_problem="",
)


def serving(talk: Callable[[Admin], Awaitable[None]], status: Callable[[], Status] = lambda: READY) -> None:
    """Run `talk` against an endpoint on a port of the kernel's choice."""

    async def run() -> None:
        endpoint = await Admin.start("127.0.0.1", 0, Metrics(), status)
        try:
            await asyncio.wait_for(talk(endpoint), 20)
        finally:
            await endpoint.stop()

    asyncio.run(run())


def ask(
    path: str,
    status: Status = READY,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    content: bytes | None = None,
) -> httpx.Response:
    """One request and its answer."""
    answers: list[httpx.Response] = []

    async def talk(endpoint: Admin) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            url = f"http://127.0.0.1:{endpoint.port}{path}"
            answers.append(await client.request(method, url, headers=headers, content=content))

    serving(talk, lambda: status)
    return answers[0]


def test_metrics_are_served_in_the_text_format() -> None:
    """What Prometheus asks for every 15 seconds."""
    answer = ask("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "sallyport_store_up" in {family.name for family in text_string_to_metric_families(answer.text)}


def test_health_is_ok_though_nothing_is_ready() -> None:
    """A restart would not mend a store that is down."""
    answer = ask("/healthz", Status())
    assert (answer.status_code, answer.text) == (200, "ok\n")


def test_ready_when_policy_store_and_audit_are() -> None:
    """Nothing stands against serving."""
    answer = ask("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"ready": True, "not_ready": {}, "reload_problems": []}


def test_a_status_nobody_filled_in_is_not_ready() -> None:
    """The zero value refuses, and every reason is listed."""
    answer = ask("/readyz", Status())
    assert answer.status_code == 503
    assert answer.json()["ready"] is False
    assert answer.json()["not_ready"].keys() == {"policy", "store", "audit"}


@pytest.mark.parametrize(
    ("changes", "what", "why"),
    [
        ({"policy": ""}, "policy", "no rules were ever loaded"),
        ({"store_up": False}, "store", "the store does not answer"),
        ({"audit_problem": "no space left on device"}, "audit", "no space left on device"),
    ],
)
def test_each_part_that_is_not_ready_says_why(changes: dict[str, object], what: str, why: str) -> None:
    """One bad part makes 503 and is named alone."""
    known = {name: getattr(READY, name) for name in Status.__dataclass_fields__}
    answer = ask("/readyz", Status(**(known | changes)))
    assert answer.status_code == 503
    assert answer.json()["not_ready"] == {what: why}


def test_a_failed_reload_is_reported_but_ready() -> None:
    """The last good policy is in force."""
    answer = ask(
        "/readyz", Status(policy="sha256:ab", store_up=True, audit_problem="", reload_problems=["a.yaml:1:1: x"])
    )
    assert answer.status_code == 200
    assert answer.json()["reload_problems"] == ["a.yaml:1:1: x"]


def test_the_status_is_json() -> None:
    """Everything the proxy says of itself."""
    answer = ask("/api/status")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "version": "0.1.0",
        "uptime": 12.5,
        "policy": "sha256:ab",
        "rules": 3,
        "agents": {"active": 2, "killed": 0},
        "store_up": True,
        "reload_problems": [],
        "audit_problem": "",
        "workers": [],
        "reloads": 0,
        "reload_problem": "",
        "awaiting_restart": [],
    }


def test_a_query_does_not_change_the_endpoint() -> None:
    """Probes add cache busters."""
    assert ask("/healthz?x=1").status_code == 200


@pytest.mark.parametrize("path", ["/", "/metrics/", "/api", "//metrics", "/%6detrics"])
def test_an_unknown_path_lists_the_endpoints(path: str) -> None:
    """Whoever is lost finds the way."""
    answer = ask(path)
    assert answer.status_code == 404
    assert answer.json()["endpoints"] == ["/metrics", "/healthz", "/readyz", "/api/status"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_only_reading_is_allowed(method: str) -> None:
    """Nothing here changes anything."""
    answer = ask("/api/status", method=method)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"


def test_head_has_the_length_and_no_body() -> None:
    """RFC 9110 section 9.3.2."""
    answer = ask("/healthz", method="HEAD")
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "3", b"")


@pytest.mark.parametrize("path", admin.ENDPOINTS)
def test_a_script_of_a_web_page_is_refused(path: str) -> None:
    """A browser names the page in Origin; Prometheus and probes send none."""
    answer = ask(path, headers={"Origin": "https://page.example"})
    assert answer.status_code == 403
    assert "sallyport" not in answer.text
    assert "access-control-allow-origin" not in answer.headers


def test_a_failure_of_ours_is_a_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """It is in the log, and the endpoint goes on."""
    codes: list[int] = []

    def broken() -> Status:
        raise RuntimeError("inner detail")

    async def talk(endpoint: Admin) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{endpoint.port}", trust_env=False) as client:
            answer = await client.get("/readyz")
            assert "inner detail" not in answer.text
            codes.extend([answer.status_code, (await client.get("/healthz")).status_code])

    serving(talk, broken)
    assert codes == [500, 200]
    assert "inner detail" in caplog.text


def test_requests_and_malformed_ones_leave_nothing_in_the_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """No access log; a scrape every 15 seconds would bury everything else."""
    caplog.set_level(logging.WARNING)

    async def talk(endpoint: Admin) -> None:
        for request in (
            b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\r\n\r\n",
            b"BREW / HTTP/1.1\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
            writer.write(request)
            writer.write_eof()
            await reader.read()
            writer.close()
            await writer.wait_closed()

    serving(talk)
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000,
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n",
    ],
)
def test_a_request_that_is_too_large_is_cut_off(request_bytes: bytes) -> None:
    """Heads of 16 KiB, bodies of 1 KiB."""

    async def talk(endpoint: Admin) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        writer.write(request_bytes)
        try:
            answer = await reader.read()
        except ConnectionResetError:
            answer = b""
        assert b" 200 " not in answer
        writer.close()

    serving(talk)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /healthz HTTP/1.1\r\nHo", b"GET /healthz HTTP/1.1\r\nContent-Length: 9\r\n\r\n"]
)
def test_a_client_that_never_finishes_its_request_is_closed(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """Slow clients do not pile up."""
    monkeypatch.setattr(admin, "IDLE", 0.1)

    async def talk(endpoint: Admin) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        writer.write(sent)
        assert await reader.read() == b""
        writer.close()

    serving(talk)


def test_a_client_that_never_takes_its_answer_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer would stay in memory for as long as it likes."""
    monkeypatch.setattr(admin, "STALL", 0.1)
    large = Status(reload_problems=["x" * 20_000_000])

    async def talk(endpoint: Admin) -> None:
        with socket.create_connection(("127.0.0.1", endpoint.port)) as client:
            client.sendall(b"GET /api/status HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not endpoint._server._connections:  # noqa: ASYNC110 - tornado tells nobody
                await asyncio.sleep(0.005)
            while endpoint._server._connections:  # noqa: ASYNC110 - tornado tells nobody
                await asyncio.sleep(0.005)

    serving(talk, lambda: large)


def test_stop_closes_connections_that_are_kept_alive_and_frees_the_port() -> None:
    """A drain ends with nothing left open."""

    async def run() -> None:
        endpoint = await Admin.start("127.0.0.1", 0, Metrics(), lambda: READY)
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"ok\n")
        await asyncio.wait_for(endpoint.stop(), 10)
        assert await reader.read() == b""
        writer.close()
        again = await Admin.start("127.0.0.1", endpoint.port, Metrics(), lambda: READY)
        await again.stop()

    asyncio.run(run())


def test_a_port_in_use_is_the_users_error() -> None:
    """One line with the next step."""

    async def talk(endpoint: Admin) -> None:
        with pytest.raises(UserError) as caught:
            await Admin.start("127.0.0.1", endpoint.port, Metrics(), lambda: READY)
        assert str(caught.value) == (
            f"admin 127.0.0.1:{endpoint.port}: address already in use; "
            "stop the other process or set admin: to a free port"
        )

    serving(talk)


@pytest.mark.parametrize(
    ("host", "place"), [("192.0.2.1", "192.0.2.1"), ("no such host", "no such host"), ("2001:db8::1", "[2001:db8::1]")]
)
def test_an_address_that_is_not_ours_is_the_users_error(host: str, place: str) -> None:
    """A typing error in the settings has no traceback."""

    async def run() -> None:
        with pytest.raises(UserError) as caught:
            await Admin.start(host, 0, Metrics(), lambda: READY)
        text = str(caught.value)
        assert text.startswith(f"admin {place}:0: ")
        assert text.endswith("; set admin: to an address and port this user may listen on")
        assert "attempting" not in text

    asyncio.run(run())


def test_a_foreign_host_on_loopback_is_a_rebound_page() -> None:
    """DNS rebinding sends the page's own name; a loopback address is asked for by number or as localhost."""
    assert ask("/api/status", headers={"host": "evil.example:9090"}).status_code == 421
    assert ask("/api/status", headers={"host": "localhost:9090"}).status_code == 200
