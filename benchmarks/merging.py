"""Merging at Switch-Base's shape: peak memory, and time against reading the sources and writing the result once.

    python benchmarks/merging.py FOLDER_WITH_SPACE [--layers 12] [--pairs 5]

Writes random sources of 8 experts (2.5 GB each; six of them) and results into FOLDER (25 GB), and the
machine's merging.json, or with other than 12 layers merging_N_layers.json.
Each pair times the merge and, after it, plain reading of the source files and writing of the result's bytes. Both begin with
nothing waiting to be written and without the sources in the system's cache, and end when all is on the disk.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import statistics
import time
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parent.parent
CASES = ((3, 8), (3, 16), (6, 16))  # sources, target experts
PEAK_GB, TIMES = 1.5, 2.0  # what to stay below


def shapes(layers: int):
    """(name, shape) of every tensor of a Switch-Base with `layers` + `layers` layers and 8 experts."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sparse = {"num_sparse_encoder_layers": layers // 2, "num_sparse_decoder_layers": layers // 2}
    sizes = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_experts": 8}
    config = SwitchTransformersConfig(**sizes, **sparse, num_layers=layers, num_decoder_layers=layers)
    with torch.device("meta"):
        model = SwitchTransformersForConditionalGeneration(config)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def make_source(folder: Path, seed: int, layers: int) -> None:
    """One file of random weights, unless it is there."""
    import torch
    from safetensors.torch import save_file

    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        state = {name: torch.empty(shape).uniform_(generator=generator) for name, shape in shapes(layers)}
        save_file(state, folder / "unfinished", metadata={"format": "pt"})
        (folder / "unfinished").rename(folder / "model.safetensors")


def start_cold(sources: list[Path]) -> None:
    """Write what waits, and let the system forget the sources' bytes."""
    os.sync()
    for path in [file for source in sources for file in source.glob("*.safetensors")]:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def merge(sources: list[Path], target: int, result: Path, layers: int) -> tuple[float, float]:
    """(seconds, peak GB) of this process."""
    import torch
    from transformers.models.switch_transformers.caem import merge_lazily

    from expert_merging.core.host_memory import keep_freed_memory
    from expert_merging.core.safetensors_folder import SafetensorsFolder, write_tensors

    keep_freed_memory()  # as the script does
    random = torch.Generator().manual_seed(0)
    counts = [torch.randint(1, 1000, (layers // 2, 8), generator=random) for _ in range(2 * len(sources))]
    usage = [{"encoder": counts[2 * i], "decoder": counts[2 * i + 1]} for i in range(len(sources))]
    result.mkdir()
    start_cold(sources)
    started = time.monotonic()
    _, tensors = merge_lazily([SafetensorsFolder(source) for source in sources], usage, target)
    write_tensors(tensors, result)
    os.sync()
    return time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def read_and_write(sources: list[Path], result: Path, copy: Path) -> float:
    """Seconds to read every byte of the sources, and to write as many bytes as the result has."""
    buffer = bytearray(1 << 24)
    start_cold(sources)
    started = time.monotonic()
    for path in [file for source in sources for file in sorted(source.glob("*.safetensors"))]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    left = sum(file.stat().st_size for file in result.glob("*.safetensors"))
    with copy.open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(memoryview(buffer)[: min(len(buffer), left)])
    os.sync()
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where sources and results go")
    parser.add_argument("--layers", type=int, default=12, help="of encoder and decoder each; 12 is Switch-Base [12]")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each case [5]")
    chosen = parser.parse_args()

    sources = [chosen.folder / f"source-{number}-{chosen.layers}" for number in range(max(n for n, _ in CASES))]
    # Each in a process of its own: peak memory is that of a whole life.
    own = multiprocessing.get_context("spawn")
    for seed, folder in enumerate(sources):
        with own.Pool(1) as pool:
            pool.apply(make_source, (folder, seed, chosen.layers))
    rows = []
    result, copy = chosen.folder / "result", chosen.folder / "copy"
    for number, target in CASES:
        ours, theirs, peaks = [], [], []
        for _ in range(chosen.pairs):
            shutil.rmtree(result, ignore_errors=True)
            with own.Pool(1) as pool:
                seconds, peak = pool.apply(merge, (sources[:number], target, result, chosen.layers))
            ours.append(seconds)
            peaks.append(peak)
            theirs.append(read_and_write(sources[:number], result, copy))
        depth = "" if chosen.layers == 12 else f", {chosen.layers} + {chosen.layers} layers"
        name = f"merging {number} sources of 8 experts into {target}{depth}"
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        row = {"name": f"{name}: time", "ratio": round(ratio, 3), "target": TIMES, "better": "lower", "unit": "s"}
        row |= {"ours": round(statistics.median(ours), 2), "theirs": round(statistics.median(theirs), 2)}
        rows.append(row | {"pairs": [[round(a, 2), round(b, 2)] for a, b in zip(ours, theirs, strict=True)]})
        row = {
            "name": f"{name}: peak memory",
            "ratio": round(max(peaks) / PEAK_GB, 3),
            "target": 1.0,
            "better": "lower",
        }
        row |= {"unit": "GB", "ours": round(max(peaks), 2), "theirs": PEAK_GB}
        rows.append(row | {"pairs": [[round(peak, 2), PEAK_GB] for peak in peaks]})
        for row in rows[-2:]:
            print("{name}: {ours} {unit} against {theirs}: ratio {ratio}, target {target}".format(**row))
    shutil.rmtree(result, ignore_errors=True)
    copy.unlink(missing_ok=True)
    name = "merging" if chosen.layers == 12 else f"merging_{chosen.layers}_layers"
    machine.write(name, {"layers": chosen.layers, "rows": rows})


if __name__ == "__main__":
    main()
