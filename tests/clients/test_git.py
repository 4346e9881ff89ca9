"""git clones and pushes over smart HTTP with a token it never sees."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from tests.clients.githttp import AUTHOR, NO_GIT_CONFIG, GitHost, git
from tests.clients.sandbox import Sandbox, tool
from tests.harness import Proxy, Upstream, server_context

SECRET = "ghp_1b7E9fQx4Kz8RmV2sLw6TnYc3HdJ5pAu0Xy"
RULES = """
version: 1
rules:
  - name: git
    match: {host: github.test, method: [GET, POST], path: /acme/**}
    action: allow
    inject: [{credential: github, as: basic, username: x-access-token}]
"""


@pytest.fixture(scope="module")
def server(upstream_ca: trustme.CA) -> Iterator[Upstream]:
    with Upstream(server_context(upstream_ca, "github.test")) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def proxy(make_proxy: Callable[..., Proxy], server: Upstream) -> Proxy:
    proxy = make_proxy(RULES, {"github.test:443": f"127.0.0.1:{server.port}"})
    proxy.credential("github", SECRET, "--host", "github.test")
    return proxy


@pytest.fixture
def repository(server: Upstream, tmp_path: Path) -> Path:
    """The bare repository behind https://github.test/acme/x.git."""
    (tmp_path / "srv" / "acme").mkdir(parents=True)
    server.reset()
    server.handler = host = GitHost(tmp_path / "srv", "x-access-token", SECRET)
    return host.create("acme/x.git", {"README.md": "hello\n"})


def clone(sandbox: Sandbox) -> Path:
    """A clone in the sandbox; git tells every byte of its traffic."""
    tracing = {"GIT_TRACE_CURL": "1", "GIT_TRACE_REDACT": "0"}
    sandbox.run(tool("git"), "clone", "https://github.test/acme/x.git", "x", extra=NO_GIT_CONFIG | tracing)
    return sandbox.home / "x"


def assert_injected(server: Upstream, sandbox: Sandbox) -> None:
    """Every request had the token, and nobody else has it."""
    assert server.seen
    assert all(seen.header("authorization")[0].startswith("Basic ") for seen in server.seen)
    assert not [seen for seen in server.seen if seen.header("proxy-authorization")]
    sandbox.proxy.audit(len(server.seen), host="github.test", verdict="allow", status=200)
    sandbox.assert_no_trace(SECRET)


def test_git_clones_after_the_407_challenge(server: Upstream, repository: Path, sandbox: Sandbox) -> None:
    """It proves its agent only when asked; the answer to that names the scheme."""
    folder = clone(sandbox)
    assert (folder / "README.md").read_text() == "hello\n"
    trace = sandbox.printed[-1]
    assert "407 Proxy Authentication Required" in trace
    assert "[redacted:github]" in trace
    assert_injected(server, sandbox)


@pytest.mark.parametrize("size", [1_000, 3_000_000], ids=["small", "chunked"])
def test_git_pushes(server: Upstream, repository: Path, sandbox: Sandbox, size: int) -> None:
    """A push of over 1 MiB goes as chunks, after a probe with an empty one."""
    folder = clone(sandbox)
    (folder / "data").write_bytes(random.Random(1).randbytes(size))
    for words in (("add", "."), ("commit", "-m", "more"), ("push", "origin", "HEAD:main")):
        sandbox.run(tool("git"), "-C", folder, *AUTHOR, *words, extra=NO_GIT_CONFIG)
    assert git(folder, "rev-parse", "HEAD") == git(repository, "rev-parse", "main")
    assert any(seen.header("transfer-encoding") for seen in server.seen) == (size > 1_048_576)
    assert_injected(server, sandbox)


def test_git_shows_why_it_was_refused(server: Upstream, repository: Path, sandbox: Sandbox) -> None:
    """A repository that no rule names."""
    sandbox.run(tool("git"), "clone", "https://github.test/other/x.git", expect=128, extra=NO_GIT_CONFIG)
    assert "403" in sandbox.printed[-1]
    assert server.seen == []
