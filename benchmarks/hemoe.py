"""HEMoE's partition, importance scores, a LLaMA-3.2-1B's way through them, and answering questions.

    python benchmarks/hemoe.py partition              16 layers of 8,192 neurons, 8 domains: minutes
    python benchmarks/hemoe.py importance [--pairs 3] one backward pass a batch against the released gradients
    python benchmarks/hemoe.py full_size FOLDER       LLaMA-3.2-1B's shape, random weights: 12 GB of memory, 15 of disk
    python benchmarks/hemoe.py answers MODEL TASKS    prompts read once for all answers, against lm_eval's own reading

partition solves every layer at neuron level and over 128 modules, then gives HiGHS as long on the same two problems. Scores
are log-normal; a neuron's scores in two domains correlate between 0.5 (first layer) and 0.95 (last). Its modules are of
like neurons: the same favourite domain, like sums. Over neurons HiGHS gets the first layer alone, since it overstays its
time there. Each part writes benchmarks/results/hemoe_{part}.json; partition and full_size go on where they were interrupted.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import machine
import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def row(name: str, ours: float, theirs: float, unit: str, target: float | None, pairs=None, ratio=None) -> dict:
    """`ratio` is theirs / ours (of times) unless given; 0 where there is none."""
    return {
        "name": name, "ratio": round(theirs / ours if ratio is None else ratio, 4), "target": target,
        "ours": float(f"{ours:.6g}"), "theirs": float(f"{theirs:.6g}"), "unit": unit,
        "pairs": pairs or [[ours, theirs]],
    }  # fmt: skip


def record_of(part: str) -> Path:
    return machine.path_of(f"hemoe_{part}")


def begun(part: str, shape: str):
    """What an interrupted run of the same shape has, or {}."""
    from expert_merging.core.files import read_json

    found = read_json(record_of(part)) if record_of(part).exists() else {}
    return found if found.get("unfinished") and found["shape"] == shape else {}


# ---------------------------------------------------------------- partition


def instance(depth: int, neurons: int, domains: int, seed: int = 0) -> np.ndarray:
    """Raw scores [L, N, D]."""
    random = np.random.default_rng(seed)
    layers = []
    for shared in np.linspace(0.5, 0.95, depth):
        common, own = random.standard_normal((neurons, 1)), random.standard_normal((neurons, domains))
        masses = random.normal(0, 0.3, domains)
        layers.append(0.1 * np.exp(np.sqrt(shared) * common + np.sqrt(1 - shared) * own + masses))
    return np.stack(layers)


def like_modules(scores: np.ndarray, count: int) -> np.ndarray:
    """The module [N] of each neuron: neurons of one favourite domain and like sums are together."""
    order = np.lexsort((scores.sum(1), scores.argmax(1)))
    member = np.empty(len(scores), dtype=int)
    member[order] = np.arange(len(scores)) * count // len(scores)
    return member


def partition(chosen) -> tuple[list[dict], dict]:
    from expert_merging.core.errors import UserError
    from expert_merging.core.files import write_json
    from expert_merging.hemoe import solver
    from expert_merging.hemoe.importance import processed
    from expert_merging.hemoe.partition import Settings

    modules, settings = 128, Settings()
    weights = processed(instance(chosen.layers, chosen.neurons, 8))
    shape = f"{chosen.layers} layers of {chosen.neurons} neurons"
    layers = begun("partition", shape).get("layers", [])
    for layer, scores in list(enumerate(weights))[len(layers) :]:
        grouped = np.zeros((modules, 8))
        np.add.at(grouped, like_modules(scores, modules), scores)
        problems = {
            name: solver.Problem(items, 8, *settings.sizes(len(items)), settings.per_domain(8))
            for name, items in (("neurons", scores), ("modules", grouped))
        }
        found = {"layer": layer, "cheap_bound": solver.cheap_bound(problems["neurons"])}
        for name, problem in problems.items():
            started = time.process_time()
            solution = solver.solve(problem, count=settings.starts, seed=layer, seconds=settings.seconds)
            spent = time.process_time() - started
            sizes = np.bincount(solution.labels, minlength=8)
            fits = (sizes >= problem.low).all() and (sizes <= problem.high).all()
            fits &= (solution.serves.sum(1) >= 1).all() and (solution.serves.sum(0) <= problem.per_domain).all()
            found[name] = {key: getattr(solution, key) for key in ("objective", "bound", "gap", "status", "seconds")}
            found[name] |= {"core_seconds": spent, "feasible": bool(fits), "sizes": sizes.tolist()}
        for name, problem in problems.items():
            if name == "neurons" and layer:  # HiGHS overstays its time there, by minutes
                continue
            started = time.monotonic()
            try:
                theirs = solver.solve(problem, solver="highs", seconds=max(1.0, found[name]["seconds"]))
                of_highs = {"objective": theirs.objective, "bound": theirs.bound}
            except UserError:
                of_highs = {"objective": None, "bound": None}
            found[f"highs, {name}"] = of_highs | {"seconds": time.monotonic() - started}
        layers.append(found)
        write_json(record_of("partition"), {"unfinished": True, "shape": shape, "layers": layers})
        print(f"layer {layer}: " + "; ".join(_said(name, found[name]) for name in found if name in LINES), flush=True)
    assert all(one[name]["feasible"] for one in layers for name in ("neurons", "modules"))

    def of(name: str, key: str) -> list[float]:
        return [one[name][key] or 0.0 for one in layers if name in one]

    def compared(name: str, theirs: str, ours: str = "neurons") -> list[dict]:
        """No row where theirs found nothing in any layer."""
        pairs = [(one[ours]["objective"], one[theirs]["objective"]) for one in layers if theirs in one]
        pairs = [pair for pair in pairs if pair[1] is not None]
        if not pairs:
            return []
        means = [float(np.mean(column)) for column in zip(*pairs, strict=True)]
        return [row(f"{name}, least of {len(pairs)} layers", *means, "", 1.0, pairs, min(a / b for a, b in pairs))]

    return [
        row(f"partition of {shape}: time of the clock, against 5 minutes", sum(of("neurons", "seconds")), 300.0, "s", 1.0),
        row(f"partition of {shape}: time of one core", sum(of("neurons", "core_seconds")), 300.0, "s", 1.0),
        *compared("partition, neurons against 128 modules", "modules"),
        *compared("partition, neurons, against HiGHS as long", "highs, neurons"),
        *compared("partition, 128 modules, against HiGHS as long", "highs, modules", "modules"),
    ], {
        "shape": shape, "layers_proved_optimal": sum(one["neurons"]["status"] == "optimal" for one in layers),
        "greatest_gap": max(of("neurons", "gap")), "layers": layers,
    }  # fmt: skip


LINES = ("neurons", "modules", "highs, neurons", "highs, modules")


def _said(name: str, found: dict) -> str:
    if found["objective"] is None:
        return f"{name}: nothing in {found['seconds']:.1f} s"
    return f"{name}: {found['objective']:.4f} of at most {found['bound']:.4f} in {found['seconds']:.1f} s"


# ---------------------------------------------------------------- importance


def tiny_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    ))  # fmt: skip


def random_batch(random, count: int, shortest: int, longest: int, vocabulary: int, prompt: float = 0.6) -> dict:
    """`count` sequences of random tokens, padded on the right; the loss is on what follows the prompt."""
    import torch

    lengths = random.integers(shortest, longest + 1, count)
    width = int(lengths.max())
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    ids = random.integers(3, vocabulary, (count, width)) * mask
    wanted = mask.astype(bool) & (np.arange(width) >= (prompt * lengths[:, None]).astype(int))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": np.where(wanted, ids, -100)}
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def released_scores(model, batches: list[dict]):
    """The released form: for every sequence alone three gradients a layer, each a backward pass of its own."""
    import torch

    model.eval()
    total = 0
    for batch in batches:
        for one in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][one].sum())
            loss = model(**{name: values[one : one + 1, :length] for name, values in batch.items()}).loss
            layers = []
            for layer in model.model.layers:
                terms = []
                for part, axis in ((layer.mlp.up_proj, 1), (layer.mlp.gate_proj, 1), (layer.mlp.down_proj, 0)):
                    (gradient,) = torch.autograd.grad(loss, part.weight, retain_graph=True)
                    terms.append((part.weight.detach() * gradient).sum(axis))
                layers.append(sum(terms))
            total = total + torch.stack(layers).abs().double()
    return total.numpy()


def importance(chosen) -> tuple[list[dict], dict]:
    from expert_merging.core.host_memory import keep_freed_memory
    from expert_merging.hemoe.importance import score

    keep_freed_memory()  # as the script does, for both
    model, random = tiny_model(), np.random.default_rng(0)
    batches = [random_batch(random, 256, 10, 24, 64) for _ in range(chosen.batches)]
    pairs, worst = [], 0.0
    for number in range(chosen.pairs + 1):  # the first warms up
        started = time.process_time()
        ours = score(model, {"all": batches}).values[..., 0]
        between = time.process_time()
        theirs = released_scores(model, batches)
        ended = time.process_time()
        worst = max(worst, float((np.abs(ours - theirs) / np.maximum(theirs, 1e-3 * theirs.mean())).max()))
        if number:
            pairs.append([between - started, ended - between])
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    name = f"importance of {256 * chosen.batches} sequences, 4 layers of 256 neurons"
    rows = [row(name, ours, theirs, "s", 20.0, pairs, ratio)]
    agreement = row("importance, greatest relative difference of a score", worst, 1e-4, "", 1.0, ratio=worst / 1e-4)
    rows.append(agreement | {"better": "lower"})
    return rows, {}


# ---------------------------------------------------------------- full size


def _make(folder: Path) -> dict:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rope_theta=500000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "dense")
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _score(folder: Path) -> dict:
    from transformers import AutoModelForCausalLM

    from expert_merging.core.host_memory import keep_freed_memory
    from expert_merging.hemoe.importance import score

    keep_freed_memory()  # as the script does, for both
    model, random = AutoModelForCausalLM.from_pretrained(folder / "dense"), np.random.default_rng(0)
    started = time.monotonic()
    batches = {f"domain{d}": [random_batch(random, 1, 48, 64, 128000)] for d in range(8)}
    score(model, batches).save(folder / "scores.npz")
    return {"sequences": 8, "scoring_alone_s": round(time.monotonic() - started, 1)}


def _partition(folder: Path) -> dict:
    from expert_merging.hemoe.importance import Scores
    from expert_merging.hemoe.partition import Settings, partition

    scores = Scores.load(folder / "scores.npz")
    split = partition("HEMoE", Settings(seconds=20.0), scores.values, domains=scores.domains)
    split.save(folder / "split.npz")
    return {
        "proved_optimal": split.status.count("optimal"), "greatest_gap": float(split.gap.max()),
        "least_objective_of_bound": float((split.objective / split.bound).min()), "sizes": split.sizes.tolist(),
    }  # fmt: skip


def _convert(folder: Path) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    from expert_merging.hemoe.modeling import HEMoEConfig, HEMoEForCausalLM
    from expert_merging.hemoe.split import Split

    dense, split = AutoModelForCausalLM.from_pretrained(folder / "dense").eval(), Split.load(folder / "split.npz")
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 128000, (1, 48)))
    with torch.inference_mode():
        before = dense(ids).logits
        cut = list(range(3, 15))  # the authors' layers
        config = HEMoEConfig(dense.config.to_dict(), cut, [split.experts[layer] for layer in cut], k=8)
        model = HEMoEForCausalLM(config, dense).eval()
        after = model(ids).logits
    model.save_pretrained(folder / "moe")
    return {"greatest_difference_of_logits_at_k_n": float((before - after).abs().max())}


def _step(work, folder: Path) -> dict:
    started = time.monotonic()
    found = work(folder)
    spent = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return found | {
        "seconds": round(time.monotonic() - started, 1),
        "core_seconds": round(spent, 1),
        "peak_gb": round(peak, 2),
    }


def full_size(chosen) -> tuple[list[dict], dict]:
    from expert_merging.core.files import write_json

    shape = "LLaMA-3.2-1B, random weights, float32"
    steps = begun("full_size", shape).get("steps", {})
    # Each in a process of its own: peak memory is that of a whole life.
    own = multiprocessing.get_context("spawn")
    for name, work in (("model", _make), ("score", _score), ("partition", _partition), ("convert", _convert)):
        if name in steps:
            continue
        with own.Pool(1) as pool:
            steps[name] = pool.apply(_step, (work, chosen.folder))
        write_json(record_of("full_size"), {"unfinished": True, "shape": shape, "steps": steps})
        print(name, steps[name], flush=True)
    return [], {"shape": shape, "steps": steps}


# ---------------------------------------------------------------- answers


def answers(chosen) -> tuple[list[dict], dict]:
    """lm_eval's answers with each prompt read once, and as lm_eval reads them, a row an answer; on the same questions."""
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from expert_merging.hemoe.evaluation import load_tasks
    from expert_merging.hemoe.shared_prompts import SharedPrompts

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model).eval()
    settings = {"pretrained": model, "tokenizer": tokenizer, "backend": "causal", "batch_size": chosen.batch}
    readers = {"shared": SharedPrompts(tqdm(disable=True), **settings), "rows": HFLM(**settings)}
    names = sorted(path.stem for path in chosen.tasks.glob("*.yaml"))
    rows = []
    for name in names:
        tasks, seconds, right = load_tasks((name,), str(chosen.tasks)), {}, {}
        for reader, lm in readers.items():
            started = time.process_time()
            found = evaluate(lm, tasks, limit=chosen.examples, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
            seconds[reader] = time.process_time() - started
            right[reader] = [sample["acc"] for sample in found["samples"][name]]
        same = sum(a == b for a, b in zip(right["shared"], right["rows"], strict=True))
        rows.append(
            row(f"{name}: prompts read once, against a row an answer", seconds["shared"], seconds["rows"], "s", None)
        )
        rows[-1]["same answers"] = f"{same} of {len(right['rows'])}"
    return rows, {"model": chosen.model.name, "examples": chosen.examples}


def tables() -> None:
    """hemoe_partition.md, a row a layer, and hemoe_full_size.md, a row a step, from the records that are there."""
    from expert_merging.core.files import read_json, write_atomic
    from expert_merging.report.tables import Table

    results = record_of("partition").parent
    layers = Table("hemoe_partition", "Partition, layer by layer", "HiGHS was given as long as the alternating solver.")
    steps = Table("hemoe_full_size", "LLaMA-3.2-1B's shape on a CPU", "Each step is a process of its own.")
    source = results / "hemoe_partition.json"
    for one in read_json(source)["layers"] if source.exists() else ():
        neurons, highs = (
            one["neurons"],
            {name: one.get(f"highs, {name}", {"objective": ""}) for name in ("neurons", "modules")},
        )
        layers.rows.append({
            "layer": one["layer"], "objective": f"{neurons['objective']:.4f}", "bound": f"{neurons['bound']:.4f}",
            "cheap bound": f"{one['cheap_bound']:.4f}", "s of one core": f"{neurons['core_seconds']:.1f}",
            "HiGHS": _number(highs["neurons"]["objective"]), "128 modules": f"{one['modules']['objective']:.4f}",
            "128 modules, HiGHS": _number(highs["modules"]["objective"]), "from": source.name,
        })  # fmt: skip
    source = results / "hemoe_full_size.json"
    for name, step in (read_json(source)["steps"] if source.exists() else {}).items():
        steps.rows.append({
            "step": name, "s": f"{step['seconds']:.0f}", "s of one core": f"{step['core_seconds']:.0f}",
            "peak GB": f"{step['peak_gb']:.1f}", "from": source.name,
        })  # fmt: skip
    for table in (layers, steps):
        if table.rows:
            write_atomic(results / f"{table.name}.md", table.markdown())


def _number(value) -> str:
    return "none" if value is None else value if isinstance(value, str) else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("partition")
    one.add_argument("--layers", type=int, default=16)
    one.add_argument("--neurons", type=int, default=8192)
    two = parts.add_parser("importance")
    two.add_argument("--pairs", type=int, default=3)
    two.add_argument("--batches", type=int, default=1, help="of 256 sequences [1]")
    parts.add_parser("full_size").add_argument("folder", type=Path, help="where the models go; must have the room")
    three = parts.add_parser("answers")
    three.add_argument("model", type=Path, help="folder of a Llama")
    three.add_argument("tasks", type=Path, help="folder of lm_eval's tasks, as HEMOE_DIR/data/eval")
    three.add_argument("--examples", type=int, default=20, help="a task [20]")
    three.add_argument("--batch", type=int, default=16, help="answers in a pass of lm_eval's own [16]")
    parts.add_parser("tables", help="from the records that are there")
    chosen = parser.parse_args()
    if chosen.part == "tables":
        return tables()
    rows, more = {"partition": partition, "importance": importance, "full_size": full_size, "answers": answers}[
        chosen.part
    ](chosen)
    for found in rows:
        print("{name}: {ours} against {theirs} {unit}: ratio {ratio}, target {target}".format(**found))
    machine.write(f"hemoe_{chosen.part}", {**more, "rows": rows})
    tables()


if __name__ == "__main__":
    main()
