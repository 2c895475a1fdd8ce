"""How many threads the numerical libraries start, and how these wait. Counts only before those libraries are loaded."""

import math
import os
from pathlib import Path

# Of libgomp, which torch carries: how often a thread looks for work before it sleeps. Its own choice (300,000 times or for
# ever) keeps a core from whoever else wants it, and then every barrier waits for a thread that is not running.
SPINS = "1000"
_CGROUP = Path("/sys/fs/cgroup")


def share_cores() -> None:
    """Let threads sleep soon when they wait, and start no more of them than there are cores for this process. What the
    user has set in the environment stays."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.intersection(os.environ):
        os.environ["GOMP_SPINCOUNT"] = SPINS
    if cores() < _by_affinity():  # which libgomp respects by itself
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def cores() -> int:
    """Cores that this process may use: by its affinity, and by the quota of its control group (version 1 or 2)."""
    return max(1, math.ceil(min(_by_affinity(), _quota())))


def _by_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on a Mac


def _quota() -> float:
    """CPUs that the control group grants; infinite where it sets no limit or cannot be read."""
    try:
        if (_CGROUP / "cpu.max").exists():
            quota, period = (_CGROUP / "cpu.max").read_text().split()
        else:
            quota, period = ((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf
