"""The steps of neighbours/HEMoE_moe_construction.py: each reads files, writes files, and is left out where its result is there.

HEMOE_DIR/data           instruction data and evaluation tasks made of docstrings (scales tiny and small)
HEMOE_DIR/seed{s}/base   the dense model trained on them (the same scales)
HEMOE_DIR/seed{s}/       domains.json, scores.npz and scores.json
.../{method}/            split.npz, split.json, parts/; model/ as converted; tuned/, tuning.json; measure.json; evaluation.json

Each step's JSON holds the constants its result follows from: found with others, the step stops and says which.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder, read_json, write_json
from expert_merging.run import provenance, results

STEPS = ("base", "domains", "scores", "partition", "conversion", "tuning", "measure", "evaluation", "report")
DENSE = ("dense", "dense_tuned")  # the references: as it is, and with the same LoRA and examples as the mixtures

# name: (partition, its settings that differ, the router: noise at the start, domains (the map's), fixed (EMoE's mean gate))
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "HEMoE": ("HEMoE", {}, "noise"),
    "HEMoE_start": ("HEMoE", {}, "domains"),
    "HEMoE_gate": ("HEMoE", {}, "fixed"),
    "HEMoE_modules": ("HEMoE", {"modules": "num_modules"}, "noise"),
    "HEMoE_equal": ("HEMoE", {"ratio": 1.0}, "noise"),
    "MoEfication": ("MoEfication", {}, "noise"),
    "MoEBERT": ("MoEBERT", {}, "noise"),
    "MoEBERT_domains": ("MoEBERT_domains", {}, "noise"),
    "random": ("random", {}, "noise"),
    "random_heterogeneous": ("random_heterogeneous", {}, "noise"),
    "EMoE": ("EMoE", {}, "fixed"),
    "parts": ("parts", {}, "noise"),  # the released files in PARTS_PATH
}

# What each step's result follows from, beside the earlier steps'.
_CONSTANTS = {
    "data": ("doc_train_examples", "doc_test_examples"),
    "base": (
        "base_vocab_size", "base_hidden_size", "base_intermediate_size", "base_layers", "base_heads",
        "base_tokens", "base_steps", "base_batch", "base_lr",
    ),
    "domains": ("base_model", "domains_from", "num_domains", "embedder", "held_out", "score_sequences"),
    "scores": ("max_tokens", "score_sums"),
    "split": (
        "moe_layers", "num_experts", "size_ratio", "experts_per_domain", "num_modules", "solver", "solver_starts",
        "solver_seconds", "rounding",
    ),
    "model": ("router_std", "router_k", "balance_coef", "balance_scale", "balance_padding"),
    "tuning": (
        "lora_rank", "lora_alpha", "lora_dropout", "tune_steps", "tune_batch", "tune_accumulation", "tune_lr",
        "tune_last_lr", "tune_warmup", "tune_tasks",
    ),
    "evaluation": ("eval_tasks", "eval_examples"),
}  # fmt: skip


def check(c: SimpleNamespace) -> None:
    """Raises UserError for constants that cannot be, before torch is imported."""
    domains_from, scales = ("tasks", "clusters"), ("experts", "tokens")
    for name, known in (
        ("steps", STEPS),
        ("methods", METHODS),
        ("domains_from", domains_from),
        ("balance_scale", scales),
    ):
        value = getattr(c, name)
        if unknown := [one for one in (value if isinstance(value, tuple) else (value,)) if one not in known]:
            raise UserError(f"{name}: there is no {unknown[0]!r}; there are {', '.join(known)}")
    if not 0 <= c.router_k <= c.num_experts:
        raise UserError(
            f"router_k is {c.router_k}; give 1 to {c.num_experts} (num_experts), or 0 to draw it for each step"
        )
    if bad := [k for k in c.eval_ks if not 0 <= k <= c.num_experts]:
        raise UserError(f"eval_ks holds {bad[0]}; give numbers from 1 to {c.num_experts} (num_experts), or 0 for all")
    for name in ("num_experts", "num_domains", "score_sequences", "max_tokens", "tune_steps", "tune_batch", "held_out"):
        if getattr(c, name) < 1:
            raise UserError(f"{name} is {getattr(c, name)}; it must be 1 or more")
    if c.max_tokens < 8:
        raise UserError(f"max_tokens is {c.max_tokens}; an instruction and its output need 8 or more")
    if "MoEBERT_domains" in c.methods and c.num_experts != c.num_domains and c.domains_from == "clusters":
        raise UserError(
            f"MoEBERT_domains makes an expert a domain: num_experts is {c.num_experts} and num_domains {c.num_domains}; "
            "make them equal or leave that method out"
        )
    if not c.moe_layers or len(set(c.moe_layers)) != len(c.moe_layers):
        raise UserError("moe_layers must name one layer or more, none of them twice")


# ---------------------------------------------------------------- data and the dense model


def base(c: SimpleNamespace) -> None:
    """Instruction data and tasks from docstrings, then a small Llama trained on both and on the docstrings' text."""
    if c.scale == "paper":
        return  # the dense model and the data are the user's
    from expert_merging.data import docstring_reader
    from expert_merging.hemoe import doc_choice, small_llama, tuning

    data, folder = Path(c.HEMOE_DIR) / "data", _seed_folder(c) / "base"
    identity = _identity(c, "data")
    if not _done(data / "complete.json", identity):
        docs = docstring_reader.read_docstrings()
        found = doc_choice.examples(docs, c.doc_train_examples, c.doc_test_examples)
        doc_choice.write(found, data / "train", data / "eval")
        texts = docstring_reader.pretraining_texts(docs)
        random.Random(docstring_reader.DATA_SEED).shuffle(texts)
        write_json(data / "texts.json", texts[: 2 * c.doc_train_examples])
        write_json(data / "complete.json", {"identity": identity, "texts_sha256": docstring_reader.corpus_hash(texts)})
    identity, work = _identity(c, "base"), folder.with_suffix(".run")
    if _done(folder / "base.json", identity, work):
        return

    from expert_merging.run.devices import make_accelerator
    from expert_merging.training import checkpoints

    device = make_accelerator(c).device
    texts, tasks = read_json(data / "texts.json"), read_examples(data / "train")
    answers = [f"{one['instruction']} {one['output']}" for one in tasks]
    tokenizer = small_llama.new_tokenizer([*texts, *answers], c.base_vocab_size)
    # Half of what training sees is running text, half are the tasks' examples, instruction and output.
    rng, half, stream = random.Random(c.seed), c.base_steps * c.base_batch // 2, []
    for text in rng.sample(texts, len(texts)):
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(stream) >= half * c.base_tokens:
            break
    rows = [stream[i : i + c.base_tokens] for i in range(0, len(stream) - c.base_tokens + 1, c.base_tokens)]
    seen = rng.sample(tasks, min(half, len(tasks)))
    rows += [tuning.encode(tokenizer, one, c.base_tokens)["input_ids"] for one in seen]
    model = small_llama.new_llama(c, tokenizer)
    checkpoints.claim(work, identity)
    fitted = tuning.fit(
        model, [{"input_ids": row, "labels": row} for row in rows], tokenizer.pad_token_id, work, steps=c.base_steps,
        batch_size=c.base_batch, lr=c.base_lr, seed=c.seed, on_cpu=device.type == "cpu", label="base model",
    )  # fmt: skip
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "base.json", _record(c, identity, training=fitted, parameters=model.num_parameters()))
    checkpoints.release(work)
    print(f"base model: {model.num_parameters():,} parameters, loss {fitted['loss']:.3f} nats a token")


def read_examples(folder: Path) -> list[dict[str, str]]:
    """The instruction examples {"instruction", "output", "task"} of a folder of JSON lines: {task}.jsonl, or the released
    layout {task}_template/train.json. Sorted by task. Raises UserError where there are none or one is not whole."""
    import json

    if not folder.is_dir():
        raise UserError(f"INSTRUCTIONS_PATH: there is no folder {folder}; it holds a file TASK.jsonl a task")
    files = {path.stem: path for path in folder.glob("*.jsonl")}
    files |= {path.parent.name.removesuffix("_template"): path for path in folder.glob("*/train.json")}
    examples = []
    for task, path in sorted(files.items()):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                one = {"instruction": row["instruction"].strip(), "output": row["output"].strip(), "task": task}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f'{path}, line {number}: not a JSON object with "instruction" and "output"') from error
            if one["instruction"] and one["output"]:
                examples.append(one)
    if not examples:
        raise UserError(f"INSTRUCTIONS_PATH: {folder} holds no examples; it holds a file TASK.jsonl a task")
    return examples


def _load_dense(c: SimpleNamespace):
    """(dense model in float32, tokenizer)."""
    from expert_merging.core.hub import first_line, local_folder, offline_if_unreachable

    folder = local_folder(c.base_model, "base_model")
    if folder is None:
        offline_if_unreachable()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from expert_merging.hemoe.gated_ffn import gated_ffns

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder or c.base_model)
        model = AutoModelForCausalLM.from_pretrained(folder or c.base_model, torch_dtype=torch.float32)
    except Exception as error:  # a file cut short surfaces as whatever its reader raises
        raise UserError(
            f"base_model: {c.base_model} holds no whole model and tokenizer ({first_line(error)})"
        ) from error
    gated_ffns(model)  # refuses another kind of model
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    layers = model.config.num_hidden_layers
    if bad := [layer for layer in c.moe_layers if not 0 <= layer < layers]:
        raise UserError(f"moe_layers names layer {bad[0]}; {c.base_model} has layers 0 to {layers - 1}")
    return model, tokenizer


def _tokenizer(c: SimpleNamespace):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(c.base_model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# ---------------------------------------------------------------- domains, importance, partition


def domains(c: SimpleNamespace) -> None:
    """Put aside `held_out` examples of each task, and choose `score_sequences` of each domain from the others."""
    from expert_merging.data.docstring_reader import corpus_hash
    from expert_merging.hemoe.domains import by_cluster, by_task

    path, identity = _seed_folder(c) / "domains.json", _identity(c, "domains")
    if _done(path, identity):
        return
    examples = read_examples(Path(c.INSTRUCTIONS_PATH))
    order = random.Random(c.seed).sample(range(len(examples)), len(examples))
    held, used = {task: [] for task in sorted({one["task"] for one in examples})}, []
    for i in order:
        its = held[examples[i]["task"]]
        (its if len(its) < c.held_out else used).append(i)
    if short := [task for task in held if not any(examples[i]["task"] == task for i in used)]:
        raise UserError(
            f"INSTRUCTIONS_PATH: task {short[0]} has no examples beside the {c.held_out} held out; lower held_out"
        )
    rows = [examples[i] for i in used]
    found = by_task(rows) if c.domains_from == "tasks" else by_cluster(rows, c.num_domains, c.embedder)
    if len(found.names) != c.num_domains:
        raise UserError(f"num_domains is {c.num_domains}, but {c.INSTRUCTIONS_PATH} has {len(found.names)} tasks")
    chosen = {
        name: [used[i] for i in found.members(number)[: c.score_sequences]] for number, name in enumerate(found.names)
    }
    write_json(
        path,
        _record(
            c, identity, names=list(found.names), table=found.table(rows), examples_sha256=corpus_hash(examples),
            held=held, used=used, scored=chosen,
        ),
    )  # fmt: skip
    print("domains: " + ", ".join(f"{row['domain']} {row['examples']}" for row in found.table(rows)))


class _Data:
    """The encoded examples that domains.json chose, in batches."""

    def __init__(self, c: SimpleNamespace, tokenizer):
        from expert_merging.data.docstring_reader import corpus_hash

        self._record = _read(_seed_folder(c) / "domains.json", "domains")
        self._examples = read_examples(Path(c.INSTRUCTIONS_PATH))
        if corpus_hash(self._examples) != self._record["examples_sha256"]:
            raise UserError(f"{c.INSTRUCTIONS_PATH} has changed since the step domains; remove {_seed_folder(c)}")
        self._tokenizer, self._c = tokenizer, c

    def rows(self, count: int, tasks: tuple[str, ...]) -> list[dict[str, list[int]]]:
        """For training, at most `count`; of the tasks named, or ("all",)."""
        chosen = [i for i in self._record["used"] if tasks == ("all",) or self._examples[i]["task"] in tasks][:count]
        if not chosen:
            raise UserError(f"tune_tasks: {self._c.INSTRUCTIONS_PATH} has no examples of {', '.join(tasks)}")
        return self._encoded(chosen)

    def batches(self, which: str) -> dict[str, list[dict]]:
        """{domain: batches} to score by ("scored"), {task: batches} held out ("held")."""
        from expert_merging.hemoe.tuning import batches

        pad, size = self._tokenizer.pad_token_id, self._c.eval_batch_size
        return {name: batches(self._encoded(chosen), size, pad) for name, chosen in self._record[which].items()}

    def _encoded(self, chosen: list[int]) -> list[dict[str, list[int]]]:
        from expert_merging.hemoe.tuning import encode

        return [encode(self._tokenizer, self._examples[i], self._c.max_tokens) for i in chosen]


def scores(c: SimpleNamespace) -> None:
    """Importance of every FFN neuron to every domain: one backward pass a batch."""
    from expert_merging.hemoe.importance import score

    folder, identity = _seed_folder(c), _identity(c, "scores")
    if _done(folder / "scores.json", identity):
        return
    from expert_merging.run.devices import make_accelerator

    model, tokenizer = _load_dense(c)
    found = score(model.to(make_accelerator(c).device), _Data(c, tokenizer).batches("scored"), accumulate=c.score_sums)
    found.save(folder / "scores.npz")
    record = _record(
        c, identity, domains=found.domains, sequences=found.sequences, correlation=_correlations(found.values)
    )
    write_json(folder / "scores.json", record)


def _correlations(values) -> list[float]:
    """Of each layer the mean correlation between two domains' log scores: how little there is to tell them apart by."""
    import numpy as np

    result = []
    for layer in np.log1p(values):
        matrix = np.corrcoef(layer.T)
        result.append(float(matrix[~np.eye(len(matrix), dtype=bool)].mean()))
    return result


def partition(c: SimpleNamespace) -> None:
    """Split the neurons of every layer in `moe_layers` by each method."""
    from expert_merging.hemoe.importance import Scores
    from expert_merging.hemoe.partition import Settings
    from expert_merging.hemoe.partition import partition as split_by

    found, gates = None, None
    order = sorted(c.methods, key=lambda method: method == "random_heterogeneous")  # it copies HEMoE's sizes
    for method in order:
        folder, identity = _seed_folder(c) / method, _identity(c, "split", method=method)
        if _done(folder / "split.json", identity):
            continue
        if gates is None:
            found = Scores.load(_seed_folder(c) / "scores.npz")
            model, _ = _load_dense(c)
            layers = list(c.moe_layers)
            gates = [model.model.layers[layer].mlp.gate_proj.weight.detach().float().numpy() for layer in layers]
        name, other, _ = METHODS[method]
        settings = {
            "experts": c.num_experts, "ratio": c.size_ratio, "experts_per_domain": c.experts_per_domain, "seed": c.seed,
            "starts": c.solver_starts, "seconds": c.solver_seconds, "solver": c.solver, "rounding": c.rounding,
            **{key: getattr(c, value) if isinstance(value, str) else value for key, value in other.items()},
        }  # fmt: skip
        if name == "parts":
            split = _imported(c, gates[0].shape[0])
        else:
            like = _split(c, "HEMoE") if name == "random_heterogeneous" else None
            split = split_by(
                name, Settings(**settings), scores=found.values[layers], gates=gates, like=like, layers=layers,
                domains=found.domains,
            )  # fmt: skip
        split.save(folder / "split.npz")
        split.export_parts(folder / "parts")
        write_json(
            folder / "split.json", _record(c, identity, split=split.record(), left_out=split.left_out().tolist())
        )
        print(f"{method}: sizes {[sorted(sizes) for sizes in split.sizes.tolist()]}")


def _imported(c: SimpleNamespace, neurons: int):
    """The split that PARTS_PATH holds."""
    from expert_merging.hemoe.split import Split

    split = Split.import_parts(c.PARTS_PATH, "parts", c.moe_layers)
    if (split.neurons, split.expert_count) != (neurons, c.num_experts):
        raise UserError(
            f"PARTS_PATH: {c.PARTS_PATH} splits {split.neurons} neurons into {split.expert_count} experts; base_model has "
            f"{neurons} and num_experts is {c.num_experts}"
        )
    return split


def _split(c: SimpleNamespace, method: str):
    from expert_merging.hemoe.split import Split

    path = _seed_folder(c) / method / "split.npz"
    if not path.exists():
        raise UserError(f"{path} does not exist; run the step partition with {method} among the methods first")
    return Split.load(path)


# ---------------------------------------------------------------- the mixture


def conversion(c: SimpleNamespace) -> None:
    """The dense model cut up by each split, as a folder that loads alone."""
    for method in c.methods:
        folder, identity = _seed_folder(c) / method / "model", _identity(c, "model", method=method)
        if _done(folder / "hemoe.json", identity):
            continue
        import torch

        from expert_merging.hemoe.modeling import HEMoEConfig, HEMoEForCausalLM
        from expert_merging.hemoe.router_start import start_from_domains

        split, (dense, tokenizer), (_, _, router) = _split(c, method), _load_dense(c), METHODS[method]
        config = HEMoEConfig(
            dense=dense.config.to_dict(), moe_layers=split.layers, experts=split.experts, k=c.router_k or c.num_experts,
            router="fixed" if router == "fixed" else "learned", router_std=c.router_std, balance_coef=c.balance_coef,
            balance_scale=c.balance_scale, balance_padding=c.balance_padding, domains=split.domains, serves=split.serves,
        )  # fmt: skip
        torch.manual_seed(c.seed)  # of the routers
        model = HEMoEForCausalLM(config, dense)
        if router == "domains":
            start_from_domains(model, _Data(c, tokenizer).batches("scored"))
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / "hemoe.json", _record(c, identity, parameters=model.num_parameters()))


def tuning(c: SimpleNamespace) -> None:
    """LoRA on attention and the routers in full, experts frozen; the dense model with the same LoRA as a reference."""
    for method in (*c.methods, "dense_tuned"):
        folder, identity = _seed_folder(c) / method, _identity(c, "tuning", method=method)
        work = folder / "tuning.run"
        if _done(folder / "tuning.json", identity, work):
            continue
        import torch

        from expert_merging.hemoe import tuning as lora
        from expert_merging.run.devices import make_accelerator
        from expert_merging.training import checkpoints

        device = make_accelerator(c).device
        dense = method == "dense_tuned"
        model, tokenizer = _load_dense(c) if dense else (_load_mixture(folder / "model"), _tokenizer(c))
        torch.manual_seed(c.seed)
        model = lora.add_lora(model, c.lora_rank, c.lora_alpha, c.lora_dropout)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        checkpoints.claim(work, identity)
        rows = _Data(c, tokenizer).rows(c.tune_steps * c.tune_batch * c.tune_accumulation, c.tune_tasks)
        fitted = lora.fit(
            model, rows, tokenizer.pad_token_id, work, steps=c.tune_steps, batch_size=c.tune_batch,
            accumulation=c.tune_accumulation, lr=c.tune_lr, last_lr=c.tune_last_lr, warmup=c.tune_warmup, seed=c.seed,
            on_cpu=device.type == "cpu", bf16=device.type == "cuda", any_k=c.router_k == 0 and not dense,
            label=f"tuning {method}",
        )  # fmt: skip
        model = model.merge_and_unload()
        with new_folder(folder / "tuned") as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        write_json(folder / "tuning.json", _record(c, identity, training=fitted, trained_parameters=trained))
        checkpoints.release(work)
        print(f"{method}: loss {fitted['loss']:.3f} after {fitted['steps']} steps, {fitted['seconds']:.0f} s")


def _load_mixture(folder: Path):
    from expert_merging.core.hub import first_line
    from expert_merging.hemoe.modeling import HEMoEForCausalLM

    if not folder.exists():
        raise UserError(
            f"{folder} does not exist; run the step {'tuning' if folder.name == 'tuned' else 'conversion'} first"
        )
    try:
        return HEMoEForCausalLM.from_pretrained(folder)
    except Exception as error:  # a file cut short surfaces as whatever its reader raises
        raise UserError(f"{folder} is damaged ({first_line(error)}); remove it and run its step again") from error


def measure(c: SimpleNamespace) -> None:
    """On held-out examples, for each k: the share of neurons that is activated, and the loss of the right answers."""

    def prepare():
        from expert_merging.hemoe.evaluation import measure as measured

        batches = _Data(c, _tokenizer(c)).batches("held")
        return lambda model, tokenizer: measured(model, batches)

    _for_each_k(c, "measure", "tuning", prepare)


def evaluation(c: SimpleNamespace) -> None:
    """Accuracy by lm_eval, 0-shot, for each k."""

    def prepare():
        from expert_merging.hemoe.evaluation import accuracy, load_tasks

        tasks = load_tasks(c.eval_tasks, c.EVAL_TASKS_PATH)
        return lambda model, tokenizer: accuracy(model, tokenizer, tasks, c.eval_batch_size, c.eval_examples)

    _for_each_k(c, "evaluation", "evaluation", prepare)


def _for_each_k(c: SimpleNamespace, step: str, follows: str, prepare: Callable[[], Callable]) -> None:
    """Write {step}.json of every model: {"k": {k: what the function that `prepare` gives finds}}, after each k anew.

    Which numbers k are asked for does not change what is found: the constants that count are those up to `follows`.
    """
    from tqdm.auto import tqdm

    function = None
    for method in (*DENSE, *c.methods):
        folder, identity = _seed_folder(c) / method, _identity(c, follows, method=method)
        path = folder / f"{step}.json"
        every = list(range(1, c.num_experts + 1))
        ks = [0] if method in DENSE else every if 0 in c.eval_ks else list(c.eval_ks)
        record = read_json(path) if _done(path, identity) else _record(c, identity, k={})
        left = [k for k in ks if str(k) not in record["k"]]
        if not left:
            continue
        from expert_merging.run.devices import make_accelerator

        function = function or prepare()
        if method in DENSE:
            model, tokenizer = _load_dense(c) if method == "dense" else _load_tuned_dense(c, folder / "tuned")
        else:
            model, tokenizer = _load_mixture(folder / "tuned"), _tokenizer(c)
        model = model.to(make_accelerator(c).device)
        for k in tqdm(left, desc=f"{step}, {method}", unit="k", dynamic_ncols=True):
            if k:
                model.config.k = k
            record["k"][str(k)] = function(model, tokenizer)
            write_json(path, record)


def _load_tuned_dense(c: SimpleNamespace, folder: Path):
    if not folder.exists():
        raise UserError(f"{folder} does not exist; run the step tuning first")
    return _load_dense(SimpleNamespace(**{**vars(c), "base_model": str(folder)}))


# ---------------------------------------------------------------- files


def _seed_folder(c: SimpleNamespace) -> Path:
    return Path(c.HEMOE_DIR) / f"seed{c.seed}"


def _identity(c: SimpleNamespace, step: str, **more: Any) -> dict[str, Any]:
    """The constants of `step` and of those before it; at scale paper the data and the dense model are the user's."""
    names = ["scale"] if step == "data" else ["scale", "seed"]
    for one, its in _CONSTANTS.items():
        if c.scale != "paper" or one not in ("data", "base"):
            names += its
        if one == step:
            break
    wanted = {name: getattr(c, name) for name in names} | more
    if c.scale != "paper":
        wanted.pop("base_model", None)  # where ours lies; what it is the rest tells
    return {name: list(value) if isinstance(value, tuple) else value for name, value in wanted.items()}


def _done(path: Path, identity: dict[str, Any], work: Path | None = None) -> bool:
    """Whether a step's result is there; then `work`, its checkpoints, goes, which a kill may have left. Raises UserError
    where it was made with other constants."""
    if not path.exists():
        return False
    if difference := results.changes(read_json(path)["identity"], identity):
        raise UserError(
            f"{path} was made with other constants ({difference}); restore them, or choose another HEMOE_DIR"
        )
    if work:
        shutil.rmtree(work, ignore_errors=True)
    return True


def _read(path: Path, step: str) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} does not exist; run the step {step} first")
    return read_json(path)


def _record(c: SimpleNamespace, identity: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "command": provenance.command(), "versions": provenance.versions() | _more_versions(), "seed": c.seed,
        "identity": identity, **more,
    }  # fmt: skip


def _more_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("peft", "lm_eval", "scipy", "scikit-learn")}
