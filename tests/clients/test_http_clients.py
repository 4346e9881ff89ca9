"""curl, wget, httpx, requests and Node.js send a request with a credential they never see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.sandbox import NODE_MODULES, Sandbox, reflecting, tool
from tests.harness import Proxy, Upstream, echo

SECRET = "http-client-key-Q7w+e/R9~tY2"
URL = "https://api.test/v1/things?n=1"
RULES = """
version: 1
rules:
  - name: api
    match: {host: api.test, path: /v1/**}
    action: allow
    inject: [{credential: api, as: bearer}]
  - name: login
    match: {host: api.test, method: POST, path: /login}
    action: allow
    inject: [{credential: api, as: placeholder, in: [body]}]
"""


@pytest.fixture(scope="module")
def proxy(make_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = make_proxy(RULES)
    proxy.credential("api", SECRET, "--host", "api.test")
    return proxy


@pytest.fixture
def api(upstream: Upstream) -> Upstream:
    """An upstream that echoes the credential in its headers and its body."""
    upstream.handler = lambda seen: reflecting(echo(seen), seen)
    return upstream


def assert_injected(api: Upstream, sandbox: Sandbox, answer: str, requests: int = 1) -> None:
    """The upstream got the credential, the client its answer without, and nobody kept it."""
    assert [seen.header("authorization") for seen in api.seen] == [[f"Bearer {SECRET}"]] * requests
    assert not [seen for seen in api.seen if seen.header("proxy-authorization")]
    headers: list[list[str]] = json.loads(answer)["headers"]
    assert ["authorization", "Bearer [redacted:api]"] in [[name.lower(), value] for name, value in headers]
    line = sandbox.proxy.audit(path="/v1/things", agent="coder-1")[-1]
    assert line["injected"] == [{"credential": "api", "version": 1, "location": "header:authorization"}]
    sandbox.assert_no_trace(SECRET)


def test_the_exported_variables_name_the_running_proxy(proxy: Proxy, variables: dict[str, str]) -> None:
    """Its port was the kernel's choice."""
    host, port = proxy.address
    assert variables["HTTPS_PROXY"] == f"http://coder-1:{proxy.tokens['coder-1']}@{host}:{port}"
    assert (proxy.folder / "certs" / "ca.pem").read_text() in Path(variables["SSL_CERT_FILE"]).read_text()


@pytest.mark.parametrize("version", ["--http2", "--http1.1"])
def test_curl(api: Upstream, sandbox: Sandbox, version: str) -> None:
    """Over either version of HTTP, with all it can tell of the connection."""
    result = sandbox.run(tool("curl"), "--silent", "--show-error", "--verbose", version, URL)
    assert "x-you-sent: Bearer [redacted:api]" in result.stderr
    assert_injected(api, sandbox, result.stdout)


@pytest.mark.parametrize("version", ["--http2", "--http1.1"])
@pytest.mark.parametrize("how", ["expect", "chunked"])
def test_curl_uploads(api: Upstream, sandbox: Sandbox, version: str, how: str) -> None:
    """A body of over 1 MiB goes with `Expect: 100-continue`; one that is piped has no length."""
    body = b"0123456789abcdef" * 131072
    (sandbox.home / "upload").write_bytes(body)
    chunked = ("--header", "Transfer-Encoding: chunked") if how == "chunked" else ()
    command = (tool("curl"), "--silent", "--show-error", version, *chunked, "--data-binary", "@upload", URL)
    result = sandbox.run(*command)
    assert [seen.body == body for seen in api.seen] == [True]
    assert_injected(api, sandbox, result.stdout)


@pytest.mark.parametrize("version", ["--http2", "--http1.1"])
@pytest.mark.parametrize("size", [1, 2_000_000])
def test_curl_names_the_credential_in_its_body(api: Upstream, sandbox: Sandbox, version: str, size: int) -> None:
    """Where it stands the secret goes out, and the length is right, whether the body was held or streamed."""
    body = f"key=slp_placeholder_api&filler={'x' * size}&last=1"
    (sandbox.home / "form").write_text(body)
    sandbox.run(tool("curl"), "--silent", "--fail", version, "--data-binary", "@form", "https://api.test/login")
    assert [seen.body.decode() for seen in api.seen] == [body.replace("slp_placeholder_api", SECRET)]
    line = sandbox.proxy.audit(path="/login")[-1]
    assert line["injected"] == [{"credential": "api", "version": 1, "location": "placeholder:body"}]
    sandbox.assert_no_trace(SECRET)


def test_wget(api: Upstream, sandbox: Sandbox) -> None:
    """With nothing but the variables."""
    result = sandbox.run(tool("wget"), "--server-response", "--output-document=-", URL)
    assert "x-you-sent: Bearer [redacted:api]" in result.stderr
    assert_injected(api, sandbox, result.stdout)


@pytest.mark.parametrize("library", ["httpx", "requests"])
def test_python(api: Upstream, sandbox: Sandbox, library: str) -> None:
    """Twice, so that a connection is reused where the library keeps one."""
    client = {"httpx": "httpx.Client()", "requests": "requests.Session()"}[library]
    result = sandbox.python(
        f"""
        import {library}
        with {client} as client:
            client.get({URL!r}).raise_for_status()
            answer = client.get({URL!r}, headers={{"authorization": "Bearer of-the-agent"}})
        assert answer.headers["x-you-sent"] == "Bearer [redacted:api]"
        print(answer.text)
        """
    )
    assert_injected(api, sandbox, result.stdout, requests=2)


def test_python_urllib(api: Upstream, sandbox: Sandbox) -> None:
    """Nothing but the standard library."""
    result = sandbox.python(f"import urllib.request; print(urllib.request.urlopen({URL!r}).read().decode())")
    assert_injected(api, sandbox, result.stdout)


def test_node_fetch(api: Upstream, sandbox: Sandbox) -> None:
    """Node 24 heeds the variables when NODE_USE_ENV_PROXY says so, and `agent env` does."""
    result = sandbox.node(
        f"""
        const answer = await fetch({json.dumps(URL)});
        if (answer.headers.get("x-you-sent") !== "Bearer [redacted:api]") throw answer;
        console.log(await answer.text());
        """
    )
    assert_injected(api, sandbox, result.stdout)


def test_node_https(api: Upstream, sandbox: Sandbox) -> None:
    """The older of its two clients."""
    result = sandbox.node(
        f"""
        import https from "node:https";
        https.get({json.dumps(URL)}, (answer) => answer.pipe(process.stdout));
        """
    )
    assert_injected(api, sandbox, result.stdout)


def test_node_undici(api: Upstream, sandbox: Sandbox) -> None:
    """The agent that older versions of Node need; npm brings a copy of it."""
    undici = NODE_MODULES / "npm" / "node_modules" / "undici" / "index.js"
    result = sandbox.node(
        f"""
        import undici from {json.dumps(str(undici))};
        const dispatcher = new undici.EnvHttpProxyAgent();
        const answer = await undici.fetch({json.dumps(URL)}, {{ dispatcher }});
        console.log(await answer.text());
        """
    )
    assert_injected(api, sandbox, result.stdout)


def test_a_refusal_reaches_each_client_in_words(api: Upstream, sandbox: Sandbox) -> None:
    """Inside the tunnel, where the client shows it."""
    url = "https://api.test/v2/things"
    told = [
        sandbox.run(tool("curl"), "--silent", "--show-error", url).stdout,
        sandbox.python(f"import httpx; print(httpx.get({url!r}).text)").stdout,
        sandbox.node(f"console.log(await (await fetch({json.dumps(url)})).text())").stdout,
    ]
    errors: list[dict[str, Any]] = [json.loads(text)["error"] for text in told]
    assert {error["code"] for error in errors} == {"no_rule"}
    assert {error["message"] for error in errors} == {"No rule allows coder-1 to GET api.test/v2/things."}
    assert api.seen == []


def test_without_a_token_curl_is_told_what_is_missing(api: Upstream, sandbox: Sandbox) -> None:
    """A connection that proves no agent ends at the CONNECT."""
    host, port = sandbox.proxy.address
    result = sandbox.run(
        tool("curl"), "--silent", "--show-error", "--verbose", "--proxy", f"http://{host}:{port}", URL, expect=56
    )
    assert "407" in result.stderr
    assert api.seen == []
