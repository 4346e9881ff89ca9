"""How many CPUs this process may use: what `workers: auto` stands for."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as a container sees its own


def usable_cpus(quota: Path = _QUOTA) -> int:
    """CPUs we may be scheduled on, or fewer where a container's limit is lower; a part of one counts as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text().split()
        return max(1, min(allowed, math.ceil(int(most) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no limit, or none that is told
        return allowed
