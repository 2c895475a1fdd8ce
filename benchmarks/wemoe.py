"""
WEMoE and E-WEMoE at CLIP ViT-B/32's shape on a CPU: a forward pass with weights of its own for every sample of a batch of 16,
against the plain model and against a loop over the samples; and their bytes on disk.

    python benchmarks/wemoe.py [--threads N] [--pairs N] [--layers 12]

Random weights, 8 task vectors. Writes wemoe.json. Models that are compared are timed in turn; with one
thread the time is the processor's. Needs 5 GB of memory and 2 GB for
temporary files.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from layer import report, seconds
from transformers import CLIPVisionConfig, CLIPVisionModel

from expert_merging.wemoe import checkpoints
from expert_merging.wemoe.ffn import ensembles, upscale

ROOT = Path(__file__).resolve().parent.parent

BATCH, TASKS, PRUNE = 16, 8, 0.9
TWICE, QUARTER = 2.0, 0.25  # what to stay below: the plain model's time, WEMoE's bytes


class Expert(Mapping[str, torch.Tensor]):
    """A fine-tuned model that is made tensor by tensor, so that eight of them take no memory."""

    def __init__(self, base: Mapping[str, torch.Tensor], number: int):
        self.base, self.number = base, number

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.base[name]
        if not tensor.is_floating_point():
            return tensor
        seed = 1000 * self.number + sorted(self.base).index(name)
        return tensor + 1e-3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def in_form(model: torch.nn.Module, pixels: torch.Tensor, form: str | None) -> torch.Tensor:
    """A forward pass computed in the given way; see `WeightEnsemblingFFN`."""
    for _, layer in ensembles(model):
        layer.form = form
    return model(pixels)[0]


def pairs_of(ours: Callable, theirs: Callable, pairs: int) -> list[tuple[float, float]]:
    """Seconds of both, in turn, after one of each to warm up."""
    return [(seconds(ours), seconds(theirs)) for _ in range(pairs + 1)][1:]


def lower(name: str, times: list[tuple[float, float]], target: float) -> dict:
    """A row where less is better: ours as a multiple of theirs."""
    ours, theirs = (statistics.median(values) for values in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    return {
        "name": name, "ratio": round(ratio, 3), "target": target, "better": "lower", "ours": round(ours, 4),
        "theirs": round(theirs, 4), "unit": "s", "pairs": [[round(a, 4), round(b, 4)] for a, b in times],
    }  # fmt: skip


def gain(name: str, times: list[tuple[float, float]]) -> dict:
    """A row where more is better: theirs as a multiple of ours."""
    row = lower(name, times, None)
    del row["better"]
    return row | {"ratio": round(statistics.median(b / a for a, b in times), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12, help="ViT-B/32 has 12 [12]")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    base = CLIPVisionModel(CLIPVisionConfig(patch_size=32, num_hidden_layers=chosen.layers)).eval()
    experts = [Expert(base.state_dict(), number) for number in range(TASKS)]
    pixels = torch.randn(BATCH, 3, 224, 224)
    rows, sizes, differences = [], {}, {}
    for name, prune in (("WEMoE", 0.0), (f"E-WEMoE {PRUNE:.0%}", PRUNE)):
        model = upscale(base, experts, prune=prune, share_router=prune > 0)

        run = partial(in_form, model, pixels, None)
        way = "product" if prune else "loop"  # the loop would make the sparse vectors dense for every sample
        differences[f"{name}: {way}"] = (run() - in_form(model, pixels, way)).abs().max().item()
        times = pairs_of(run, lambda: base(pixels), chosen.pairs)
        rows.append(lower(f"{name} sample-wise against the plain model, batch {BATCH}", times, TWICE))
        if not prune:
            times = pairs_of(run, partial(in_form, model, pixels, "loop"), chosen.pairs)
            rows.append(gain(f"{name} sample-wise against a loop over samples, batch {BATCH}", times))
        with tempfile.TemporaryDirectory() as folder:
            sizes[name] = checkpoints.save(model, Path(folder) / "model")
    size = {name: parameter.numel() * parameter.element_size() for name, parameter in base.named_parameters()}
    of_base = sum(size.values())
    inside = tuple(f"{name}." for name, _ in ensembles(model))
    of_layers = sum(own for name, own in size.items() if name.startswith(inside))
    (dense, sparse), files = sizes.values(), ("task_vectors.safetensors", "routers.safetensors")
    whole = [sum(size.values()) for size in (sparse, dense)]
    for name, ours, theirs, target in (
        ("task vectors and routers", *(sum(size[f] for f in files) for size in (sparse, dense)), QUARTER),
        ("folder, loaded onto theta_0", *whole, QUARTER),
        ("folder and theta_0's feed-forward layers", *(size + of_layers for size in whole), None),  # all a model needs
        ("folder and theta_0", *(size + of_base for size in whole), None),
    ):
        rows.append({
            "name": f"bytes on disk, E-WEMoE {PRUNE:.0%} against WEMoE: {name}", "ratio": round(ours / theirs, 4),
            "target": target, "better": "lower", "ours": ours, "theirs": theirs, "unit": "bytes", "pairs": 1,
        })  # fmt: skip
    report(rows, "wemoe", layers=chosen.layers, tasks=TASKS, largest_difference_to=differences)


if __name__ == "__main__":
    main()
