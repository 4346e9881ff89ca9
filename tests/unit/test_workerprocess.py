"""What a worker is given, and how its end is told."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from proxy.settings import load_settings
from proxy.workerprocess import Task, ended

SETTINGS = """
listen: ["127.0.0.1:0", {address: "[::1]:0", agent: coder-1}]
store: redis://:p4ssw0rd@127.0.0.1:6379/0
workers: 2
identity: {networks: {10.1.2.0/24: coder-1}}
upstream:
  connect_to: {"api.test:443": "127.0.0.1:9443"}
  nameservers: ["127.0.0.1:5353"]
  allow_addresses: [10.0.0.0/8]
limits: {idle: 5s, buffer: 2MiB}
"""


def arrived[T](sent: T) -> T:
    """As the worker has it."""
    there: T = pickle.loads(pickle.dumps(sent))  # noqa: S301  # our own
    return there


def test_settings_reach_a_worker_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "sallyport.yaml").write_text(SETTINGS)
    task = Task(2, load_settings(None, {}, {}, tmp_path), ((7,), (8, 9)), (("127.0.0.1", 9090),), 10, 11)
    assert arrived(task) == task


def test_so_does_a_parent_proxy_with_its_password(tmp_path: Path) -> None:
    """It travels through a pipe, never through arguments."""
    (tmp_path / "sallyport.yaml").write_text("upstream: {via: 'http://user:p4ssw0rd@proxy.test:3128'}")
    via = load_settings(None, {}, {}, tmp_path).upstream.via
    there = arrived(via)
    assert via
    assert there
    assert there.endpoint == via.endpoint
    assert there._authorization == via._authorization


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (1, "ended with status 1"),
        (-9, "was ended by SIGKILL"),
        (-11, "was ended by SIGSEGV"),
        (-99, "was ended by signal 99"),
    ],
)
def test_the_end_of_a_worker_is_told_in_words(status: int, words: str) -> None:
    assert ended(status) == words
