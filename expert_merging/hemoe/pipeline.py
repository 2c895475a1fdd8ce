"""What the steps of neighbours/HEMoE_moe_construction.py share: their constants, what a result depends on, where it lies.

HEMOE_DIR/data           instruction data and evaluation tasks: of docstrings (not at scale paper), RAW_PATH, QUESTIONS_PATH
HEMOE_DIR/seed{s}/base   the dense model trained on them (scales tiny and night)
HEMOE_DIR/seed{s}/       domains.json, scores.npz and scores.json, of other domains beside the script's own, too
.../{method}/            split.npz, split.json, parts/; model/: its routers as converted; measure_before.json and
                         evaluation_before.json; tuned/, tuning.json; measure.json; evaluation.json. Tuned for one task,
                         the last four have its name at their end: tuned_{task}/ and so on

Each step reads files, writes files, and is left out where its result is there (run/results.py).
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

from expert_merging.core.errors import UserError, at_least
from expert_merging.core.files import read_json, sha256
from expert_merging.core.hub import weights_sha256
from expert_merging.run import provenance, results

STEPS = ("data", "base", "domains", "scores", "partition", "conversion", "tuning", "measure", "evaluation", "report")
APART = ("seed", "method", "tune_tasks", "parts_sha256")  # in which the identities of one table's records differ
BEFORE = "_before"  # what the names of results before tuning end in
DENSE = ("dense", "dense_tuned")  # the references: as it is, and with the same LoRA and examples as the mixtures


class Method(NamedTuple):
    """How a mixture is made.

    `settings` are the partition's that differ; `router`: what it is at the start, noise, gate (EMoE's: the expert's mean gate)
    or domains (the map's), or fixed (gate, and not trained), as `router_start` says where none is named; `domains`: which of
    `DOMAINS` importance is measured on.
    """

    partition: str
    settings: Mapping[str, Any] = MappingProxyType({})
    router: str = ""
    domains: str = ""


METHODS = {
    "HEMoE": Method("HEMoE"),
    "HEMoE_start": Method("HEMoE", router="domains"),
    "HEMoE_gate": Method("HEMoE", router="fixed"),
    "HEMoE_modules": Method("HEMoE", {"modules": "num_modules"}),
    "HEMoE_equal": Method("HEMoE", {"ratio": 1.0}),
    "MoEfication": Method("MoEfication"),
    "MoEBERT": Method("MoEBERT"),
    "MoEBERT_domains": Method("MoEBERT_domains"),
    "random": Method("random"),
    "random_heterogeneous": Method("random_heterogeneous"),
    "EMoE": Method("EMoE", router="fixed"),
    "HEMoE_noise": Method("HEMoE", router="noise"),
    "HEMoE_tasks": Method("HEMoE", domains="tasks"),
    "HEMoE_tfidf": Method("HEMoE", domains="tfidf"),
    "parts": Method("parts"),  # the released files in PARTS_PATH
}
# What domains are made from: the script's constants, or others in the place of some.
DOMAINS: dict[str, dict[str, Any]] = {
    "": {}, "tasks": {"domains_from": "tasks"}, "tfidf": {"domains_from": "clusters", "embedder": "tfidf"},
}  # fmt: skip

# What each step's result follows from, beside the earlier steps'.
_CONSTANTS = {
    "data": ("doc_train_examples", "doc_test_examples", "eval_questions"),
    "base": (
        "base_vocab_size", "base_hidden_size", "base_intermediate_size", "base_layers", "base_heads",
        "base_tokens", "base_steps", "base_batch", "base_lr",
    ),
    "domains": ("base_model", "domains_from", "num_domains", "embedder", "held_out", "task_examples", "score_sequences"),
    "scores": ("max_tokens", "score_sums", "prompts"),
    "split": (
        "moe_layers", "num_experts", "size_ratio", "experts_per_domain", "num_modules", "solver", "solver_starts",
        "solver_seconds", "rounding",
    ),
    "model": ("router_start", "router_std", "router_k", "balance_coef", "balance_scale", "balance_padding"),
    "tuning": (
        "lora_rank", "lora_alpha", "lora_dropout", "tune_steps", "tune_batch", "tune_accumulation", "tune_lr",
        "tune_last_lr", "tune_warmup", "tune_tasks", "save_dtype", "precision",
    ),
    "evaluation": ("eval_tasks", "eval_examples"),
}  # fmt: skip


def check(c: SimpleNamespace) -> None:
    """Raises UserError for constants that cannot be, before torch is imported."""
    domains_from, scales, prompts = ("tasks", "clusters"), ("experts", "tokens"), ("plain", "chat")
    for name, known in (
        ("steps", STEPS),
        ("methods", METHODS),
        ("domains_from", domains_from),
        ("balance_scale", scales),
        ("router_start", ("noise", "gate")),
        ("prompts", prompts),
        ("save_dtype", ("float32", "bfloat16")),
        ("score_sums", ("float64", "bfloat16")),
    ):
        value = getattr(c, name)
        if unknown := [one for one in (value if isinstance(value, tuple) else (value,)) if one not in known]:
            raise UserError(f"{name}: there is no {unknown[0]!r}; there are {', '.join(known)}")
    if not 0 <= c.router_k <= c.num_experts:
        raise UserError(
            f"router_k is {c.router_k}; give 1 to {c.num_experts} (num_experts), or 0 to draw it for each step"
        )
    if "all" in c.tune_tasks and len(c.tune_tasks) > 1:
        raise UserError(f"tune_tasks is {c.tune_tasks}; give all, or the tasks to tune a model each for")
    if bad := [k for k in (*c.eval_ks, c.before_k) if not 0 <= k <= c.num_experts]:
        raise UserError(
            f"eval_ks or before_k holds {bad[0]}; give numbers from 1 to {c.num_experts} (num_experts), or 0 for all"
        )
    at_least(c, 0, "eval_questions")
    at_least(
        c, 1, "num_experts", "num_domains", "score_sequences", "max_tokens", "tune_steps", "tune_batch", "tune_accumulation",
        "held_out", "solver_starts", "lora_rank", "size_ratio",
    )  # fmt: skip
    if not 0 <= c.lora_dropout < 1 or not 0 <= c.tune_warmup < 1:
        raise UserError("lora_dropout and tune_warmup are shares, from 0 to below 1")
    if not c.tune_lr > 0:
        raise UserError(f"tune_lr is {c.tune_lr}; it must be above 0")
    if c.max_tokens < 8:
        raise UserError(f"max_tokens is {c.max_tokens}; an instruction and its output need 8 or more")
    if not c.moe_layers or len(set(c.moe_layers)) != len(c.moe_layers) or min(c.moe_layers) < 0:
        raise UserError("moe_layers must name one layer or more, from 0, none of them twice")
    layers, neurons = _shape(c)
    if layers:
        check_layers(c, layers)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("this script runs as one process; start it by python alone, without a launcher")
    if c.QUESTIONS_PATH and c.scale != "real":
        raise UserError(
            "QUESTIONS_PATH: questions are made tasks of at --scale real; else name lm_eval's in eval_tasks"
        )
    if "partition" in c.steps:
        from expert_merging.hemoe import splitting

        splitting.check(c, neurons)


def _shape(c: SimpleNamespace) -> tuple[int | None, int | None]:
    """Layers of the dense model and neurons of an FFN; None of one on the hub, whose configuration is not here yet."""
    if makes_base(c) and Path(c.base_model) == seed_folder(c) / "base":
        return c.base_layers, c.base_intermediate_size
    config = Path(c.base_model).expanduser() / "config.json"
    there = read_json(config) if config.is_file() else {}
    return there.get("num_hidden_layers"), there.get("intermediate_size")


def check_layers(c: SimpleNamespace, layers: int) -> None:
    """Raises UserError where `moe_layers` names one that a dense model of so many layers has not."""
    if bad := [layer for layer in c.moe_layers if layer >= layers]:
        raise UserError(f"moe_layers names layer {bad[0]}; {c.base_model} has layers 0 to {layers - 1}")


def seed_folder(c: SimpleNamespace) -> Path:
    return Path(c.HEMOE_DIR) / f"seed{c.seed}"


def by_domains(c: SimpleNamespace) -> dict[str, SimpleNamespace]:
    """{which domains: the constants that make them} that the methods ask for; the script's own always. What follows from the
    others alone has their name at the end of its own: domains_tasks.json, scores_tasks.npz."""
    asked = dict.fromkeys(["", *(METHODS[method].domains for method in c.methods)])
    return {name: SimpleNamespace(**vars(c) | DOMAINS[name]) for name in asked}


def ending(name: str) -> str:
    return name and f"_{name}"


def tunings(c: SimpleNamespace) -> dict[str, tuple[str, ...]]:
    """{what the names of a tuned model and its results end in: the tasks it is tuned on}. With `tune_tasks` all there is
    one model for all tasks; named tasks have a model each, as the authors', of the same domains, scores and partition."""
    return {"": ("all",)} if c.tune_tasks == ("all",) else {f"_{task}": (task,) for task in c.tune_tasks}


def identity(c: SimpleNamespace, step: str, **more: Any) -> dict[str, Any]:
    """What the result of `step` depends on: its constants and those of the steps before it.

    At scale paper the data and the dense model are the user's. At tiny and night the model is made by the step base, and
    its constants tell what it is; where `base_model` names another, the hash of its weights does.
    """
    names = ["scale"] if step == "data" else ["scale", "seed"]
    for one, its in _CONSTANTS.items():
        if (one != "data" or c.scale != "paper") and (one != "base" or makes_base(c)):
            names += its
        if one == step:
            break
    wanted = results.identity(c, names, **more)
    if more.get("method") == "parts":
        wanted["parts_sha256"] = _parts_sha256(c.PARTS_PATH)
    if c.scale != "paper" and wanted.pop("base_model", None) and Path(c.base_model) != seed_folder(c) / "base":
        wanted["base_model"] = _weights_sha256(c.base_model)
    return wanted


def makes_base(c: SimpleNamespace) -> bool:
    """Whether the dense model is one that is trained here."""
    return c.scale in ("tiny", "night")


_weights_sha256 = functools.cache(weights_sha256)  # identities are asked for often


@functools.cache
def _parts_sha256(path: str) -> dict[str, str]:
    """SHA-256 of each of the released files in a folder."""
    return {file.name: sha256(file) for file in sorted(Path(path).expanduser().glob("*.part.*"))}


def is_done(path: Path, wanted: dict[str, Any], work: Path | None = None, claim: Path | None = None) -> bool:
    """`results.is_done` of a step's result."""
    return results.is_done(path, wanted, work, claim=claim, elsewhere="HEMOE_DIR")


def save(c: SimpleNamespace, path: Path, wanted: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """`results.save` with the seed, and the versions of the libraries that only HEMoE uses."""
    from importlib.metadata import version

    more = {name: version(name) for name in ("peft", "lm_eval", "scipy", "scikit-learn")}
    return results.save(path, wanted, {"versions": provenance.versions() | more, "seed": c.seed, **record})


def load(path: Path, step: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """The result of an earlier step, by which another goes. Raises UserError where it is not there, or was made with another
    identity."""
    if not path.exists():
        raise UserError(f"{path} does not exist; run the step {step} first")
    record = read_json(path)
    results.refuse(path, results.made_with(record), wanted, f"restore them, or remove it and run the step {step} again")
    return record


def refuse_beside(c: SimpleNamespace) -> None:
    """Raises UserError where HEMOE_DIR has models that were tuned with other constants: one table would show both."""
    paths = sorted(Path(c.HEMOE_DIR).glob("seed*/*/tuning*.json"))
    results.refuse_others(paths, identity(c, "tuning"), "HEMOE_DIR", but=APART)
