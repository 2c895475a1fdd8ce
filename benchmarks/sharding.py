"""
What each of several processes needs of memory in training, with whole weights and with weights that are shared out (FSDP).

    python benchmarks/sharding.py [--layers 4] [--processes 2]

The shape of Switch-Base-8 with fewer layers, float32, one SQuAD-sized example a process, processes on a CPU. Counted are the
bytes of weights, gradients and AdamW's moments that a process has after the backward pass; measured (Linux) is the most
that it takes of memory during a step, less what it took before there was a model. Writes benchmarks/results/sharding.json
and sharding.md. Needs 8 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from expert_merging.core.files import write_atomic, write_json

ROOT = Path(__file__).resolve().parent.parent

TOKENS = (150, 5)
STEPS = 3  # AdamW's moments are there from the second on


def resident(field: str) -> int:
    """Bytes of memory that this process takes now ("VmRSS") or took at most since `reset_peak` ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def bytes_of(tensors) -> int:
    """Of this process's parts, where tensors are sharded."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def measure(layers: int, report: Path) -> None:
    """One of the processes: a few steps; its sizes go to `report` with its number."""
    import torch
    from layer import SHAPE
    from memory import batch_of
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    from expert_merging.run import sharding
    from expert_merging.run.devices import make_accelerator

    accelerator = make_accelerator(SimpleNamespace(device="cpu", precision="fp32", seed=0), can_shard=True)
    sparse = {"num_sparse_encoder_layers": layers // 2, "num_sparse_decoder_layers": layers // 2}
    config = SwitchTransformersConfig(**SHAPE, **sparse, num_layers=layers, num_decoder_layers=layers)
    before = resident("VmRSS")
    model = sharding.place(accelerator, SwitchTransformersForConditionalGeneration(config).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    wrapped = model
    if sharding.is_sharded(model):
        sharding.pass_over_unused(model, optimizer)
    else:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(STEPS):
        reset_peak()
        accelerator.backward(wrapped(**batch_of(1, TOKENS, "cpu"), use_cache=False).loss)
        held = {
            "weights": bytes_of(model.parameters()),
            "gradients": bytes_of(one.grad for one in model.parameters() if one.grad is not None),
        }
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peak = resident("VmHWM") - before
    states = optimizer.state_dict()["state"].values()
    held["moments"] = bytes_of(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))
    write_json(
        report / f"{accelerator.process_index}.json",
        {"parameters": model.num_parameters(), **held, "peak": peak},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of encoder and decoder each [4]")
    parser.add_argument("--processes", type=int, default=2, help="[2]")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)  # of a process that main started
    chosen = parser.parse_args()
    if chosen.report:
        measure(chosen.layers, chosen.report)
        return
    rows = []
    for way in ("whole", "sharded"):
        with tempfile.TemporaryDirectory() as folder:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", chosen.processes]
            command = [sys.executable, *launcher, __file__, "--layers", chosen.layers, "--report", folder]
            environment = {
                **os.environ, "ACCELERATE_USE_FSDP": str(way == "sharded").lower(), "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "65536",  # else the C library would keep some of what is freed
            }  # fmt: skip
            subprocess.run([str(word) for word in command], check=True, env=environment)
            rows += [{"way": way, **json.loads(path.read_text())} for path in sorted(Path(folder).glob("*.json"))]
    from expert_merging.run.provenance import versions

    about = {"layers": chosen.layers, "processes": chosen.processes, "tokens": TOKENS, "versions": versions()}
    write_json(ROOT / "benchmarks" / "results" / "sharding.json", {**about, "rows": rows})
    names = ("weights", "gradients", "moments", "peak")
    lines = ["| way | weights, GB | gradients, GB | moments, GB | peak of a step, GB |", "|---|---:|---:|---:|---:|"]
    for way in ("whole", "sharded"):
        most = {name: max(row[name] for row in rows if row["way"] == way) for name in names}
        lines.append(f"| {way} | {' | '.join(f'{most[name] / 1e9:.2f}' for name in names)} |")
    write_atomic(ROOT / "benchmarks" / "results" / "sharding.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
