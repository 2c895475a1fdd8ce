"""tools/merge.py on folders of Mixtral-8x7B's shape: peak memory against what is promised.

    python benchmarks/merge_mixtral.py FOLDER_WITH_SPACE [--layers 1]

Writes three sources, each `--layers` of Mixtral-8x7B's 32 at full width (hidden size 4096, 8 experts of 14336, embeddings of
32000; 3.4 GB a source with one layer, in bfloat16), and merges them by the average, by TIES onto the first, and by CAEM with
usage that is made up. Promised is less than two tensors a source and the largest tensor of the result, in the float32 that is
computed in, beyond what importing takes. Merging goes tensor by tensor, so what one layer takes, 32 take. FOLDER needs 14 GB
with one layer. Writes the machine's merge_mixtral.json.
"""

import argparse
import math
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import machine
from merge_folders import measure

from expert_merging.core.files import write_json

SOURCES = ("one", "two", "three")
CASES = {  # what is merged, and how; places are in FOLDER
    "average": (SOURCES, []),
    "ties": (SOURCES[1:], ["--base", SOURCES[0], "--set", "ties_keep=0.2"]),
    "caem": (SOURCES, ["--experts", "8", "--usage", *(f"{name}.usage.json" for name in SOURCES)]),
}


def make(folder: Path, layers: int) -> None:
    """The three sources and their usage."""
    import torch
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    config = MixtralConfig(num_hidden_layers=layers)  # 8x7B's shape is the default but for the depth
    d, ffn, heads = config.hidden_size, config.intermediate_size, config.num_key_value_heads
    narrow = d // config.num_attention_heads * heads
    for seed, name in enumerate(SOURCES):
        generator = torch.Generator().manual_seed(seed)
        (folder / name).mkdir(parents=True, exist_ok=True)
        config.architectures, config.torch_dtype = ["MixtralForCausalLM"], torch.bfloat16
        config.save_pretrained(folder / name)

        # Drawing all of it would take minutes.
        block = (0.02 * torch.randn(2**22 + 1, generator=generator)).to(torch.bfloat16)

        def weight(*shape, block=block):
            size = math.prod(shape)
            return block.repeat(size // len(block) + 1)[:size].reshape(shape)

        where: dict[str, str] = {}

        def shard(file: str, tensors: dict, name=name, where=where) -> None:
            where.update(dict.fromkeys(tensors, file))
            save_file(tensors, folder / name / file, {"format": "pt"})

        outer = {f"{place}.weight": weight(config.vocab_size, d) for place in ("model.embed_tokens", "lm_head")}
        shard("model-outer.safetensors", outer | {"model.norm.weight": weight(d)})
        for layer in range(layers):
            prefix, moe = f"model.layers.{layer}.", f"model.layers.{layer}.block_sparse_moe."
            tensors = {f"{prefix}{norm}_layernorm.weight": weight(d) for norm in ("input", "post_attention")}
            for matrix, rows in (("q", d), ("k", narrow), ("v", narrow), ("o", d)):
                tensors[f"{prefix}self_attn.{matrix}_proj.weight"] = weight(rows, d)
            tensors[f"{moe}gate.weight"] = weight(config.num_local_experts, d)
            for expert in range(config.num_local_experts):
                for matrix, shape in (("w1", (ffn, d)), ("w2", (d, ffn)), ("w3", (ffn, d))):
                    tensors[f"{moe}experts.{expert}.{matrix}.weight"] = weight(*shape)
            shard(f"model-layer-{layer}.safetensors", tensors)
        write_json(folder / name / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
        counts = torch.randint(1, 1000 * (seed + 1), (layers, config.num_local_experts), generator=generator)
        write_json(folder / f"{name}.usage.json", {"layers": counts.tolist()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where models and results go")
    parser.add_argument("--layers", type=int, default=1, help="of 32 [1]")
    chosen = parser.parse_args()
    # In a process of its own: a child's peak memory is counted from its parent's.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(make, (chosen.folder, chosen.layers))
    _, imports = measure(
        [sys.executable, "-c", "import torch, safetensors.torch, transformers, expert_merging.merging.registry"]
    )
    largest = 4 * 32000 * 4096 / 1e9  # GB in float32
    promised = (2 * len(SOURCES) + 1) * largest + imports
    rows = []
    for method, (models, words) in CASES.items():
        out = chosen.folder / "merged"
        places = [chosen.folder / word if (chosen.folder / word).exists() else word for word in (*models, *words)]
        command = [sys.executable, "tools/merge.py", "--method", method, "--models", *map(str, places)]
        _, peak = measure([*command, "--allow_unchanged", "--out", str(out)])
        size = sum(path.stat().st_size for path in out.iterdir()) / 1e9
        shutil.rmtree(out)
        row = {
            "name": f"three sources of Mixtral-8x7B's width, {chosen.layers} layer(s), by {method}: peak memory",
            "unit": "GB",
        }
        row |= {"ours": round(peak, 2), "theirs": round(promised, 2), "ratio": round(peak / promised, 3), "target": 1}
        rows.append(row | {"better": "lower", "result_gb": round(size, 2)})
        print("{name}: {ours} {unit} of {theirs} promised; result {result_gb} GB".format(**rows[-1]))
    for name in SOURCES:
        shutil.rmtree(chosen.folder / name)
        os.remove(chosen.folder / f"{name}.usage.json")
    machine.write("merge_mixtral", {"imports_gb": round(imports, 2), "rows": rows})


if __name__ == "__main__":
    main()
