"""
The patched Switch Transformers against stock at Switch-Base's shape, layer by layer, on the CPU: same weights, same
inputs, no padding, forward and backward, the two in turn. Needs stock's files, as caem_files/install.py keeps them.

    python benchmarks/layer.py [--threads N] [--pairs N]

Writes layer.json in the machine's folder of benchmarks/results. A ratio is the median over the pairs of stock's time by
ours. With one thread the time is the processor's, which other programs disturb less; with several it is the clock's. Needs
6 GB of memory. A machine with AVX-512 plays one without under ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
ATEN_CPU_CAPABILITY=avx2; whether MKL obeys on processors other than Intel's, the row of torch's own product tells.
"""

import argparse
import copy
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import machine
import torch
import transformers
from transformers.models.switch_transformers import cpu_kernels
from transformers.models.switch_transformers import modeling_switch_transformers as ours

from expert_merging.core.host_memory import keep_freed_memory

# google/switch-base-8, but for the number of layers: 12 and 12 there, with every second one sparse as here.
SHAPE = {
    "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_experts": 8,
    "expert_capacity": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    "dropout_rate": 0.0, "router_jitter_noise": 0.0,
}  # fmt: skip
LAYERS = 4
# Models whose plain linear layers `cpu_kernels.use_in` makes compute as ours do.
NEIGHBOURS = (
    ("4 layers of SmolLM2-135M", "LlamaForCausalLM", {
        "vocab_size": 4096, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }),
    ("6 layers of MiniLM", "BertLMHeadModel", {
        "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
        "is_decoder": True,
    }),
)  # fmt: skip
LAYER, MODEL = (1.4, 1.4) if cpu_kernels.ONEDNN else (0.97, 1.2)  # ratios to be reached


def models(layers: int = LAYERS) -> tuple:
    """(ours, stock) with the same weights and `layers` blocks in each stack, in training mode; for both, freed memory is
    kept as the scripts keep it."""
    keep_freed_memory()
    try:
        stock = importlib.import_module("transformers.models.switch_transformers_stock.modeling_switch_transformers")
    except ImportError:
        sys.exit("this compares with stock, whose files are not there: patch with python caem_files/install.py")
    if not hasattr(ours, "CAEM_PATCH"):
        sys.exit("transformers is not patched: python caem_files/install.py")
    sparse = {"num_sparse_encoder_layers": layers // 2, "num_sparse_decoder_layers": layers // 2}
    pair = []
    for module in (ours, stock):
        torch.manual_seed(0)
        config = module.SwitchTransformersConfig(**SHAPE, **sparse, num_layers=layers, num_decoder_layers=layers)
        pair.append(module.SwitchTransformersForConditionalGeneration(config).train())
    pair[0].load_state_dict(pair[1].state_dict())
    return tuple(pair)


def seconds(run: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    run()
    return clock() - started


def row(name: str, mine: Callable, theirs: Callable, pairs: int, target: float | None, share=(1, 1)) -> dict:
    """Time the two in turn, after a run of each to warm up; seconds are divided by each's `share`."""
    times = []
    for _ in range(pairs + 1):
        times.append((seconds(mine) / share[0], seconds(theirs) / share[1]))
    mine, theirs = zip(*times[1:], strict=True)
    ratio = statistics.median(b / a for a, b in times[1:])
    return {
        "name": name, "ratio": round(ratio, 3), "target": target, "ours": round(statistics.median(mine), 4),
        "theirs": round(statistics.median(theirs), 4), "unit": "s", "pairs": pairs,
    }  # fmt: skip


def report(rows: Sequence[dict], name: str, **more) -> None:
    """Print the rows and write them as the machine's {name}.json (machine.py)."""
    print(f"{'':68}{'ratio':>7}{'target':>8}{'ours':>12}{'theirs':>12}")
    for one in rows:
        target = f"{one['target']:8.2f}" if one["target"] else " " * 8
        print(f"{one['name']:68}{one['ratio']:7.2f}{target}{one['ours']:12.4g}{one['theirs']:12.4g} {one['unit']}")
    machine.write(name, {**more, "rows": list(rows)})


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--pairs", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def both_ways(module: torch.nn.Module, *inputs, **more) -> Callable[[], None]:
    """Forward and backward of a layer, from and to a random gradient; gradients begin anew each time."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    rng = torch.Generator().manual_seed(2)
    given = torch.randn(inputs[0].shape, generator=rng)

    def run() -> None:
        for tensor in (*inputs, *module.parameters(), *more.values()):
            if torch.is_tensor(tensor):
                tensor.grad = None
        made = module(*inputs, **more)
        (made[0] if isinstance(made, tuple) else made).backward(given)

    return run


def training_pass(model, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward and backward of a model with its own loss."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch, use_cache=False).loss.backward()

    return run


def peaks(pairs: int) -> dict[str, float]:
    """GFLOP/s of a large float32 product, by torch's own way and by the fastest that it has, medians."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    ways = [lambda: a @ b.t()] + [lambda: cpu_kernels.product(a, b)] * cpu_kernels.ONEDNN
    speeds = []
    for way in ways:
        way()
        speeds.append(2 * 2048**3 / 1e9 / statistics.median(seconds(way) for _ in range(pairs)))
    return {"torch's own matrix product": speeds[0], "the fastest matrix product": max(speeds)}


def main() -> None:
    chosen = arguments(__doc__)
    pair, rows, rng, length = models(), [], torch.Generator().manual_seed(1), 500
    states = torch.randn(1, length, SHAPE["d_model"], generator=rng)
    bias = torch.randn(1, SHAPE["num_heads"], length, length, generator=rng).requires_grad_()
    extra = {"attention_mask": torch.zeros(1, 1, 1, length), "position_bias": bias}

    def compare(name: str, parts: Sequence[Callable], target: float | None) -> None:
        rows.append(row(name, *parts, pairs=chosen.pairs, target=target))

    blocks = [model.encoder.block[1] for model in pair]
    layers = [block.layer[-1].mlp for block in blocks]
    compare(f"sparse layer, {length} tokens", [both_ways(layer, states) for layer in layers], LAYER)
    fastest = peaks(2 * chosen.pairs)
    with torch.no_grad():
        sent = int(layers[0].router(states)[0].sum())
    work = 3 * 4 * sent * SHAPE["d_model"] * SHAPE["d_ff"] / 1e9
    reached = work / rows[-1]["ours"]
    rows += [
        {
            "name": f"sparse layer, share of {name}", "ratio": round(reached / speed, 3), "target": 0.7,
            "ours": round(reached, 1), "theirs": round(speed, 1), "unit": "GFLOP/s", "pairs": chosen.pairs,
        }
        for name, speed in fastest.items()
    ]  # fmt: skip
    attentions = [both_ways(block.layer[0], states, **extra) for block in blocks]
    compare(f"self-attention, {length} tokens", attentions, LAYER)
    compare(f"encoder block, sparse, {length} tokens", [both_ways(block, states, **extra) for block in blocks], LAYER)
    for task, inputs, targets in (("AG News", 55, 3), ("SQuAD", 150, 5), ("XSum", 480, 25)):
        ids = [torch.randint(2, SHAPE["vocab_size"], (2, size), generator=rng) for size in (inputs, targets)]
        batch = {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "labels": ids[1]}
        compare(f"model, 2 examples of {task}'s length", [training_pass(model, batch) for model in pair], MODEL)
    for name, kind, settings in NEIGHBOURS:
        torch.manual_seed(0)
        model_class = getattr(transformers, kind)
        plain = model_class(model_class.config_class(**settings)).train()
        ids = torch.randint(2, settings["vocab_size"], (8, 64), generator=rng)
        batch = {"input_ids": ids, "labels": ids}
        both = [training_pass(model, batch) for model in (cpu_kernels.use_in(copy.deepcopy(plain)), plain)]
        compare(f"{name}, 8 x 64 tokens", both, 0.97)
    report(rows, "layer", shape=SHAPE, layers=[LAYERS, LAYERS])


if __name__ == "__main__":
    main()
