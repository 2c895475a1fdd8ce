"""Freed memory stays with the process."""

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
