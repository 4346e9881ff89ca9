"""pip and npm install from registries that want a credential which they never see."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Iterator

import pytest
import trustme

from tests.clients.registries import npm, pypi
from tests.clients.sandbox import NODE, NODE_MODULES, Sandbox, reflecting
from tests.harness import Handler, Proxy, Reply, Seen, Upstream, server_context

PYPI_SECRET = "pypi-AgEIcHlwaS5vcmcCJGI3ZjQ5MDBi"
NPM_SECRET = "npm_8Jd2kQ9xVb4Lm7Zr1Tw5Yc3Nf6Hs"
RULES = """
version: 1
rules:
  - name: pypi
    match: {host: pypi.test, method: GET}
    action: allow
    inject: [{credential: pypi, as: basic, username: __token__}]
  - name: npm
    match: {host: registry.test, method: GET}
    action: allow
    inject: [{credential: npm, as: bearer}]
"""


BASIC = f"Basic {base64.b64encode(f'__token__:{PYPI_SECRET}'.encode()).decode()}"


def guarded(registry: Handler, proof: str) -> Handler:
    """A registry that answers nobody else."""

    def handle(seen: Seen) -> Reply:
        if seen.header("authorization") != [proof]:
            return Reply(401, [("www-authenticate", 'Basic realm="registry"')])
        return registry(seen)

    return handle


@pytest.fixture(scope="module")
def registries(upstream_ca: trustme.CA) -> Iterator[Upstream]:
    with Upstream(server_context(upstream_ca, "pypi.test", "registry.test")) as upstream:
        hosts = {"pypi.test": guarded(pypi, BASIC), "registry.test": guarded(npm, f"Bearer {NPM_SECRET}")}
        upstream.handler = lambda seen: reflecting(hosts[seen.header("host")[0]](seen), seen)
        yield upstream


@pytest.fixture(scope="module")
def proxy(make_proxy: Callable[..., Proxy], registries: Upstream) -> Proxy:
    names = ("pypi.test", "registry.test")
    proxy = make_proxy(RULES, {f"{name}:443": f"127.0.0.1:{registries.port}" for name in names})
    proxy.credential("pypi", PYPI_SECRET, "--host", "pypi.test")
    proxy.credential("npm", NPM_SECRET, "--host", "registry.test", "--method", "GET")
    return proxy


def test_pip_installs_a_wheel(registries: Upstream, sandbox: Sandbox) -> None:
    """From an index that answers 401 to whoever shows no token."""
    registries.seen.clear()
    sandbox.run(
        *(sys.executable, "-I", "-m", "pip", "--verbose", "install", "--target", "site", "tiny"),
        *("--index-url", "https://pypi.test/simple/"),
        extra={"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert (sandbox.home / "site" / "tiny.py").read_text() == "ANSWER = 42\n"
    assert [seen.target for seen in registries.seen] == ["/simple/tiny/", "/files/tiny-1.0-py3-none-any.whl"]
    assert {tuple(seen.header("authorization")) for seen in registries.seen} == {(BASIC,)}
    sandbox.proxy.audit(len(registries.seen), rule="pypi", status=200)
    sandbox.assert_no_trace(PYPI_SECRET)
    sandbox.assert_no_trace(BASIC.removeprefix("Basic "))


def test_npm_installs_a_tarball(registries: Upstream, sandbox: Sandbox) -> None:
    """It sends a list of what is installed as well, for an audit, which no rule allows, and installs all the same."""
    registries.seen.clear()
    (sandbox.home / "package.json").write_text("{}")
    program = NODE_MODULES / "npm" / "bin" / "npm-cli.js"
    sandbox.run(
        *(NODE, program, "--globalconfig", os.devnull, "--loglevel", "silly"),
        *("install", "--registry", "https://registry.test/", "tiny"),
    )
    assert (sandbox.home / "node_modules" / "tiny" / "index.js").read_text() == "module.exports = 42;\n"
    targets = [seen.target for seen in registries.seen if seen.target != "/npm"]  # whether npm itself is up to date
    assert targets == ["/tiny", "/tiny/-/tiny-1.0.0.tgz"]
    assert {tuple(seen.header("authorization")) for seen in registries.seen} == {(f"Bearer {NPM_SECRET}",)}
    sandbox.proxy.audit(len(targets), rule="npm", status=200)
    assert sandbox.proxy.audit(host="registry.test", method="POST")[0]["reason"] == "no_rule"
    sandbox.assert_no_trace(NPM_SECRET)
