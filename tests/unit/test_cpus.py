"""How many CPUs may be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxy.cpus import usable_cpus


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("6400000 100000\n", 8),
        ("nonsense\n", 8),
        ("1 0\n", 8),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int) -> None:
    """On a machine of eight; a part of a CPU is one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu.max").write_text(quota)
    assert usable_cpus(tmp_path / "cpu.max") == expected


def test_without_a_limit_every_cpu_we_may_be_scheduled_on_counts(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "none") == len(os.sched_getaffinity(0))
