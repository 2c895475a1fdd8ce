"""The model on a GPU that is not there: no operation between devices, and how often the host waits for the device.

torch's fake tensors have shape, type and device without content. To differentiate through them a torch without CUDA needs a
device that does nothing (no_gpu.cpp), which is compiled here; where there is no compiler, these tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
SPARSE_LAYERS = 2  # of work.py's model


@pytest.fixture(scope="module")
def waits(tmp_path_factory):
    """{case: waits of the host in each part of it}, as work.py counts them."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    if torch.version.cuda or sys.platform != "linux":
        pytest.skip("for a torch without CUDA, on Linux")
    library = tmp_path_factory.mktemp("no_gpu") / "no_gpu.so"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    built = subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-std=c++20", "-O0", *includes, HERE / "no_gpu.cpp", "-o", library],
        capture_output=True, text=True,
    )  # fmt: skip
    if built.returncode:
        pytest.skip(f"the compiler does not take torch's headers: {built.stderr.splitlines()[0]}")
    done = subprocess.run([sys.executable, HERE / "work.py", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def on(waits, *words: str, without: str = "nothing"):
    """The cases whose names have all these words."""
    found = {
        case: counts for case, counts in waits.items() if all(word in case for word in words) and without not in case
    }
    assert found
    return found.items()


def test_nothing_waits_in_bf16_where_products_are_grouped(waits):
    for case, counts in on(waits, "with grouped products, bf16", without="without"):
        assert {part: number for part, number in counts.items() if number} in ({}, {"step": 1}), case


@pytest.mark.parametrize("words", [("fp32",), ("without grouped products",)])
def test_elsewhere_a_sparse_layer_waits_once(waits, words):
    for case, counts in on(waits, "training", *words):
        again = SPARSE_LAYERS if "checkpointing" in case and "None" not in case else 0
        assert (counts["forward"], counts["backward"], counts["step"]) == (SPARSE_LAYERS, again, 0), case
    for case, counts in on(waits, "decoding", *words):
        assert (counts["encoder"], counts["decoder"]) == (1, 3), case  # one sparse layer each, three tokens


def test_nothing_is_copied_to_the_device_on_the_way(waits):
    assert all(counts["copies"] == 0 for counts in waits.values()) and len(waits) == 32


def test_without_the_device_that_does_nothing_there_is_no_gradient(tmp_path):
    """That the tests above rest on it, and not on a torch that can do this by itself."""
    code = (
        "import torch\nfrom torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode(): torch.nn.Linear(2, 2, device='cuda')(torch.ones(2, device='cuda')).sum().backward()"
    )
    if torch.version.cuda:
        pytest.skip("this torch has CUDA")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "cuda" in done.stderr
