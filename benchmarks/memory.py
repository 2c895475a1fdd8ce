"""
What training Switch-Base needs of memory, by task, batch size, precision and gradient checkpointing: which `batch_size`
to set for a GPU of 16, 24, 48 or 80 GB.

    python benchmarks/memory.py [--layers 12] [--experts 8] [--device cpu]

On a CPU, weights, gradients and AdamW's two moments are counted (float32, each as large as the model), and what the forward
pass keeps for the backward pass is measured: the bytes of every tensor that autograd saves, each storage once, weights left
out, at two batch sizes, of which other sizes follow in proportion; with checkpointing, what one layer keeps while it is
computed again comes to it (a layer's share, were all in the encoder). Allocators, fragments, and what is there for a moment
only are not in it, and a tenth is left for them. The attention is the CPU's, whose memory is linear in the length, as is
that on GPUs; in bf16, for which CPUs have none such, it is counted as keeping its inputs and its output, which is what
torch's kernels on GPUs keep. The experts' inputs are those of grouped tokens on both. With --device cuda the peak itself is
measured (max_memory_allocated). Writes benchmarks/results/memory.json and memory.md. Needs 8 GB.
"""

import argparse
import multiprocessing
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from layer import SHAPE
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers import cpu_kernels
from transformers.models.switch_transformers import modeling_switch_transformers as patched

from expert_merging.core.files import write_atomic, write_json
from expert_merging.run.provenance import versions

ROOT = Path(__file__).resolve().parent.parent

LENGTHS = {"AG News": (55, 3), "SQuAD": (150, 5), "XSum": (480, 25), "padded to the limits": (1000, 200)}  # tokens
SIZES = (1, 2)  # examples measured
GPUS = (16, 24, 48, 80)  # GB
ROOM = 0.9  # of a GPU's memory, to be filled


class AsOnGPUs(torch.autograd.Function):
    """Attention that keeps for the backward pass, which is never run here, its inputs and its output, and bias and mask in
    one, which all layers of a stack share."""

    joined: dict[tuple, torch.Tensor] = {}

    @staticmethod
    def forward(ctx, query, key, value, bias, mask, dropout):
        of = tuple(None if one is None else (one.data_ptr(), one.shape) for one in (bias, mask))
        if of not in AsOnGPUs.joined:
            AsOnGPUs.joined[of] = patched._bias_with_mask(bias, mask, query.dtype)
        both = AsOnGPUs.joined[of]
        made = F.scaled_dot_product_attention(query, key, value, both, scale=1.0)
        ctx.save_for_backward(query, key, value, both, made)
        return made


def batch_of(examples: int, tokens: tuple[int, int], device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(2, SHAPE["vocab_size"], (examples, size), generator=generator) for size in tokens)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in made.items()}


def kept_bytes(model, batch: dict[str, torch.Tensor], bf16: bool) -> int:
    """Bytes that autograd saves in a forward pass, without the weights and, by their shapes, autocast's copies of them:
    how many of those there are depends on which experts get tokens, and `main` counts them all."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(one.shape) for one in model.parameters() if one.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            storages[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no other takes its place
        return tensor

    if bf16:
        cpu_kernels.Attend = AsOnGPUs
        AsOnGPUs.joined.clear()
        cpu_kernels.large_on_cpu = lambda states, multiplications: states.dim() == 4  # for attention, not for products
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch, use_cache=False).loss
    del loss
    return sum(size for size, _ in storages.values())


def in_a_fork(model, batch: dict[str, torch.Tensor], bf16: bool) -> int:
    """`kept_bytes` in a process of its own, whose memory is free again afterwards."""
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=lambda: its.send(kept_bytes(model, batch, bf16)), daemon=True
    )
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit(f"a process ended with status {process.exitcode}; this needs 8 GB of memory")
    return mine.recv()


def peak_bytes(model, batch: dict[str, torch.Tensor], bf16: bool) -> int:
    """Peak of allocated memory in an optimizer step on a GPU, less what weights, gradients and moments take."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    for _ in range(2):  # in the first the moments are not there yet
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - 16 * model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of encoder and decoder each; Switch-Base has 12 [12]")
    parser.add_argument("--experts", type=int, default=8, help="[8]")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda [%(default)s]"
    )
    chosen = parser.parse_args()
    torch.manual_seed(0)
    if chosen.device == "cpu":
        torch.set_num_threads(1)  # forks have no other threads
    sparse = {"num_sparse_encoder_layers": chosen.layers // 2, "num_sparse_decoder_layers": chosen.layers // 2}
    layers = {"num_layers": chosen.layers, "num_decoder_layers": chosen.layers}
    config = SwitchTransformersConfig(
        **{**SHAPE, "dropout_rate": 0.1, "num_experts": chosen.experts}, **sparse, **layers
    )
    model = SwitchTransformersForConditionalGeneration(config).train().to(chosen.device)
    measure = in_a_fork if chosen.device == "cpu" else peak_bytes
    fixed = 16 * model.num_parameters() / 1e9  # four float32 numbers a parameter
    copies = 2 * model.num_parameters() / 1e9  # autocast's, in bf16
    rows, plain = [], {}
    for bf16, checkpointing in ((False, False), (False, True), (True, False), (True, True)):
        model.gradient_checkpointing_disable()
        if checkpointing:  # re-entrant on a CPU, where the hooks see what it keeps; the scripts' kind keeps the same
            model.gradient_checkpointing_enable({"use_reentrant": chosen.device == "cpu"})
        for task, tokens in LENGTHS.items():
            one, two = (measure(model, batch_of(size, tokens, chosen.device), bf16) / 1e9 for size in SIZES)
            if chosen.device == "cpu" and checkpointing:
                one, two = (
                    kept + of_all / chosen.layers for kept, of_all in zip((one, two), plain[bf16, task], strict=True)
                )
            plain.setdefault((bf16, task), (one, two))
            if chosen.device == "cpu" and bf16:
                one, two = one + copies, two + copies
            each = (two - one) / (SIZES[1] - SIZES[0])
            fit = {gpu: max(0, int((ROOM * gpu - fixed - (one - each)) / each)) for gpu in GPUS}
            rows.append({
                "task": task, "tokens": tokens, "precision": "bf16" if bf16 else "fp32", "checkpointing": checkpointing,
                "an example, GB": round(each, 4), "any number, GB": round(one - each, 4), "fit": fit,
            })  # fmt: skip
            print(rows[-1], flush=True)
            save(chosen, model, fixed, rows)


def save(chosen: argparse.Namespace, model, fixed: float, rows: list[dict]) -> None:
    """Write what has been measured so far."""
    about = {
        "layers": chosen.layers,
        "experts": chosen.experts,
        "parameters": model.num_parameters(),
        "device": chosen.device,
    }
    about |= {"weights, gradients and moments, GB": round(fixed, 2), "versions": versions()}
    write_json(ROOT / "benchmarks" / "results" / "memory.json", {**about, "memory": rows})
    lines = [
        f"| tokens | precision | checkpointing | GB an example | {' | '.join(f'{gpu} GB' for gpu in GPUS)} |",
        f"|---|---|---|---:|{'---:|' * len(GPUS)}",
    ]
    for row in rows:
        cells = [f"{row['task']}, {row['tokens'][0]} + {row['tokens'][1]}", row["precision"]]
        cells += ["yes" if row["checkpointing"] else "no", f"{row['an example, GB']:.3f}"]
        lines.append(f"| {' | '.join([*cells, *(str(row['fit'][gpu]) for gpu in GPUS)])} |")
    write_atomic(ROOT / "benchmarks" / "results" / "memory.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
