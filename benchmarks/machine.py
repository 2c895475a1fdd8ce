"""Where a benchmark's figures lie: benchmarks/results/{processor}_{instructions}/{name}.json, so that those of one machine
never replace another's."""

import os
import platform
import re
from pathlib import Path
from typing import Any

from expert_merging.core.files import write_json
from expert_merging.run.provenance import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def processor() -> str:
    """Its name with family and model, which tell generations of one name apart: "AMD EPYC (25.17)"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    name = found.get("model name", platform.machine())
    return f"{name} ({found['cpu family']}.{found['model']})" if {"cpu family", "model"} <= found.keys() else name


def about() -> dict[str, Any]:
    """The machine, the instructions that torch uses of it, and which kernels of ours are in use."""
    import torch
    from transformers.models.switch_transformers import cpu_kernels

    return {
        "system": platform.platform(), "processor": processor(), "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "kernels": "oneDNN's for large float32 products" if cpu_kernels.ONEDNN else "torch's own",
    }  # fmt: skip


def path_of(name: str) -> Path:
    """The file of the benchmark `name` on this machine."""
    machine = about()
    slug = re.sub(r"\W+", "_", f"{machine['processor']} {machine['instructions']}".lower()).strip("_")
    return RESULTS / slug / f"{name}.json"


def write(name: str, record: dict[str, Any]) -> Path:
    """Write `record` with what it ran on; returns the file."""
    machine, path = about(), path_of(name)
    print("{processor}, {instructions}, {threads} threads; products: {kernels}".format(**machine))
    write_json(path, {"machine": machine, "versions": versions(), **record})
    return path
