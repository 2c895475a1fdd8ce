"""Freed memory stays with the process, until a new piece of work begins."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

COUNT = """
import resource, sys
from expert_merging.core.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import torch
for number in range(41):
    if number == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    first, second = torch.ones(3_000_000), torch.ones(12_000_000)
    del first, second
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_pages_are_not_asked_for_again():
    faults = {}
    for way in ("kept", "given back"):
        done = subprocess.run(
            [sys.executable, "-c", COUNT, way], cwd=ROOT, capture_output=True, text=True, check=True,
            env={**os.environ, "THP_MEM_ALLOC_ENABLE": "0"},  # the system makes pages of 2 MB only when it can
        )  # fmt: skip
        faults[way] = int(done.stdout)
    assert 10 * faults["kept"] < faults["given back"], faults


SIZE = """
from expert_merging.core import host_memory
host_memory.keep_freed_memory()
import torch
size = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024
between, large = [], []
for number in range(30):
    large.append(torch.ones(3_000_000))
    between.append(torch.ones(1_000))  # keeps the heap from shrinking
del large
before = size()
host_memory.begin_anew()
print(before - size())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_a_new_piece_of_work_begins_without_what_was_kept():
    done = subprocess.run([sys.executable, "-c", SIZE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 250, "of 360 MB that were freed"
