"""Threads: no more than the affinity and the control group allow, asleep when they wait, unless the user says otherwise."""

import math
import os

import pytest

from expert_merging.core import threads

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    return tmp_path


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "what is this"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_the_quota_counts(clean, files, cores):
    (clean / "cpu").mkdir()
    for name, text in files.items():
        (clean / name).write_text(text)
    assert threads.cores() == cores
    threads.share_cores()
    assert os.environ.get("OMP_NUM_THREADS") == (None if cores == 64 else str(cores))
    assert os.environ["GOMP_SPINCOUNT"] == threads.SPINS


def test_the_affinity_counts(clean, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert threads.cores() == 1 and threads._quota() == math.inf
    threads.share_cores()
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stays(clean, monkeypatch, name):
    (clean / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setenv(name, "7")
    threads.share_cores()
    assert os.environ[name] == "7" and ("GOMP_SPINCOUNT" in os.environ) == (name != "OMP_WAIT_POLICY")
