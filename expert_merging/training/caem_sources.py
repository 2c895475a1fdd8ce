"""CAEM from the folders and histories that single_task_finetune.py leaves (paper, Algorithm 1).

The method itself - entropy, allocation, merging - is in caem_files/caem.py, as pure functions.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.switch_transformers.caem import normalized_entropy

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder
from expert_merging.core.hub import load_tokenizer
from expert_merging.core.safetensors_folder import SafetensorsFolder, write_tensors
from expert_merging.data.docstring_reader import corpus_hash
from expert_merging.merging.average import average_lazily
from expert_merging.merging.registry import CALIBRATIONS, POOLED, SHARES
from expert_merging.run import results
from expert_merging.run.constants import command
from expert_merging.run.deviations import deviates, of_method
from expert_merging.training.families import config_lines, family_of
from expert_merging.training.finetuning import data_hashes
from expert_merging.training.overall import single_task_history


@dataclass
class Source:
    """A single-task model to merge: its folder, and its expert usage on validation, {stack: tensor [layer, expert]}."""

    task: str
    folder: Path
    config: PretrainedConfig
    usage: dict[str, torch.Tensor]
    weights_sha256: list[str]
    ancestor: str
    tokenizer: Any = None


def open_sources(c: SimpleNamespace, tasks: tuple[str, ...], experts: int, target_experts: int) -> list[Source]:
    """The single-task models of `tasks`, checked to fit together.

    Raises UserError where one is missing, damaged, of another ancestor, configuration, shape or number of experts, or without
    usage; and when `target_experts` is out of range or `c.merging`, `c.calibration` or `c.shares` unknown.
    """
    if c.merging not in ("caem", "average", *POOLED):
        raise UserError(f"merging is {c.merging!r}; there are caem, average, {', '.join(POOLED)}")
    if c.calibration not in ("none", *CALIBRATIONS):
        raise UserError(f"calibration is {c.calibration!r}; there are none, {', '.join(CALIBRATIONS)}")
    if c.shares not in (*SHARES, *tasks):
        raise UserError(f"shares is {c.shares!r}; there are {', '.join((*SHARES, *tasks))}")
    if c.pool_inputs < 0:
        raise UserError(f"pool_inputs is {c.pool_inputs}; give the number of inputs a task, or 0 for all")
    if c.merging == "average" and target_experts != experts:
        raise UserError(
            f"merging average keeps the {experts} experts of its sources; target_experts_num is {target_experts}"
        )
    if len(tasks) < 2:
        raise UserError(f"task_types names {len(tasks)} task; merging needs two or more")
    if not len(tasks) <= target_experts <= len(tasks) * experts:
        raise UserError(
            f"target_experts_num is {target_experts}; with {len(tasks)} sources of {experts} experts it must be between "
            f"{len(tasks)} and {len(tasks) * experts}"
        )
    sources = [_open_source(c, task, experts) for task in tasks]
    first = sources[0]
    for source in sources[1:]:
        if source.ancestor != first.ancestor:
            raise UserError(
                f"{source.folder} and {first.folder} come from different pre-trained models; "
                "fine-tune both from the same BASE_MODEL_PATH"
            )
        ours, theirs = config_lines(first.config), config_lines(source.config)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"config.json: {name} is {theirs.get(name)} in {source.folder} and {ours.get(name)} in {first.folder}; "
                    "fine-tune both from the same BASE_MODEL_PATH"
                )
    family = family_of(first.config)
    if c.calibration not in ("none", *family.CALIBRATIONS):
        raise UserError(f"calibration {c.calibration} is not for {first.config.model_type}; make it none")
    if c.merging not in family.MERGINGS:
        raise UserError(
            f"merging {c.merging} is not for {first.config.model_type}; there are {', '.join(family.MERGINGS)}"
        )
    first.tokenizer = load_tokenizer(str(first.folder), "SOURCE_MODEL_WEIGHT_PATH")
    return sources


def _open_source(c: SimpleNamespace, task: str, experts: int) -> Source:
    folder = Path(c.SOURCE_MODEL_WEIGHT_PATH.format(experts=experts)) / f"single_task_{task}"
    history = single_task_history(c.SOURCE_PICKLE_PATH.format(experts=experts), task, experts, c)
    digests = SafetensorsFolder(folder).sha256()
    config = AutoConfig.from_pretrained(folder)
    family = family_of(config)
    if (there := family.experts_of(config)) != experts:
        raise UserError(f"{folder} has {there} experts a sparse layer; source_experts_num is {experts}")
    family.check_constants(c, config)
    try:
        grids = _usage(c, history, task, experts, digests)
        usage = {stack: torch.tensor(grids[stack]) for stack in family.STACKS}
        ancestor = history["identity"]["ancestor"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the history of {folder} lacks expert usage ({error}); run: "
            + command("single_task_finetune.py", c, task_type=task, num_expert=experts)
        ) from error
    for stack in family.STACKS:
        if usage[stack].ndim != 2 or usage[stack].shape[1] != experts or usage[stack].sum() <= 0:
            raise UserError(
                f"the history of {folder} has {stack} usage of shape {tuple(usage[stack].shape)} or of no token; "
                f"[layers, {experts}] is wanted: train that model again"
            )
        for layer, counts in enumerate(usage[stack], 1):
            if counts.sum() == 0:
                said = (
                    f"{task}: no validation token reached {stack} sparse layer {layer}; its entropy there counts as 0"
                )
                warnings.warn(said, stacklevel=2)
    return Source(task, folder, config, usage, digests, ancestor)


def _usage(
    c: SimpleNamespace, history: dict[str, Any], task: str, experts: int, digests: list[str]
) -> dict[str, list[list[int]]]:
    """{stack: grid} counted as the reading asks: by the training run, or afterwards by tools/count_expert_usage.py."""
    if deviates(c.reading, "counts") == deviates(history["identity"]["reading"], "counts"):
        return {stack: of_tasks[task] for stack, of_tasks in history["usage"].items()}
    counted = counted_usage(c, task, experts)
    wanted = (of_method(c.reading, "counts"), c.max_input_length)
    found = [row["usage"] for row in counted["rows"] if (row["counting"], row["input_length"]) == wanted]
    if results.made_with(counted)["weights"] != digests or not found:
        raise UserError(
            f"the expert usage of {task} was counted on other weights or lengths; remove expert_usage_{task}.json in "
            f"{c.SOURCE_PICKLE_PATH.format(experts=experts)} and run: {_counting(c, task, experts)}"
        )
    return found[0]


def counted_usage(c: SimpleNamespace, task: str, experts: int) -> dict[str, Any]:
    """What tools/count_expert_usage.py left for a single-task model. Raises UserError where it did not run."""
    return results.load(
        f"{c.SOURCE_PICKLE_PATH.format(experts=experts)}/expert_usage_{task}.json",
        lambda: _counting(c, task, experts),
    )


def _counting(c: SimpleNamespace, task: str, experts: int) -> str:
    return command("tools/count_expert_usage.py", c, task_type=task, num_expert=experts)


def merge_sources(c: SimpleNamespace, accelerator, sources: list[Source], folder: Path) -> dict[str, Any]:
    """Merge `sources` into the Hugging Face folder `folder` with `c.target_experts_num` experts a sparse layer.

    `c.merging` is "caem", or a method that pools the sources' experts, or, as a control, "average": every tensor averaged,
    experts slot by slot. Returns the record that goes into the history; for CAEM, per stack, the sources' entropies, the
    experts each task got in each layer ("allocation"), which these are, and the tasks' weights; for a pooled method, per
    layer, the members of the pool in each expert (source 0's first). With `c.calibration` the record has under "calibration"
    how near each router came to the sources' choices, too.

    Raises UserError where the sources' tensors do not fit together.
    """
    identity, path = merging_identity(c, sources), folder / "merging.json"
    if accelerator.is_main_process and results.part(path, identity) is None:
        # Models that are loaded on the way draw random numbers, and what follows must not depend on whether this was done.
        with torch.random.fork_rng(devices=[]):
            _merge(c, accelerator, sources, folder, identity)
    accelerator.wait_for_everyone()
    written = results.part(path, identity)
    assert written is not None  # above, where it was not there
    if c.merging == "caem":
        accelerator.print(allocation_lines(written, tuple(source.task for source in sources)))
    return written


def _merge(c: SimpleNamespace, accelerator, sources: list[Source], folder: Path, identity: dict[str, Any]) -> None:
    try:
        if c.merging == "average":
            tensors = average_lazily([SafetensorsFolder(source.folder) for source in sources])
            record: dict[str, Any] = {}
            config = sources[0].config
        else:
            by = None if c.shares == "entropy" else other_shares(c, sources)
            record, tensors, config = family_of(sources[0].config).merge(c, sources, by, accelerator.device)
            _warn_of_no_entropy(record)
        with new_folder(folder) as temporary:
            write_tensors(tensors, temporary)
            config.save_pretrained(temporary)
            if c.calibration != "none":
                family = family_of(sources[0].config)
                record["calibration"] = family.calibrate(c, sources, temporary, record, accelerator.device)
            sources[0].tokenizer.save_pretrained(temporary)
            results.save(temporary / "merging.json", identity, record)
    except ValueError as error:
        raise UserError(f"these models cannot be merged: {error}") from error


def merging_identity(c: SimpleNamespace, sources: list[Source]) -> dict[str, Any]:
    """What the merged model depends on."""
    identity = sources_identity(sources) | {
        "target_experts": c.target_experts_num, "alpha": c.alpha, "reading": c.reading, "merging": c.merging,
    }  # fmt: skip
    if c.calibration != "none":
        identity |= {"calibration": c.calibration}
    if c.merging == "caem":
        identity |= {"usage": _usage_hashes(sources)}
    if c.merging in POOLED or c.calibration != "none":
        inputs = ("pool_inputs", "validation_examples", "max_input_length", "max_decoder_length", "seed")
        identity |= {name: getattr(c, name) for name in inputs} | {
            "data": data_hashes(c, [one.task for one in sources])
        }
    return identity if c.shares == "entropy" else identity | {"shares": c.shares, "seed": c.seed}


def sources_identity(sources: list[Source]) -> dict[str, Any]:
    """What an identity notes of `sources`: hashes of their weights, and of what else their family is known by."""
    noted: dict[str, Any] = {"sources": {source.task: source.weights_sha256 for source in sources}}
    if lines := config_lines(sources[0].config):  # those of all
        noted["config"] = corpus_hash(lines)
    if "usage" in family_of(sources[0].config).KNOWN_BY:
        noted["usage"] = _usage_hashes(sources)
    return noted


def _usage_hashes(sources: list[Source]) -> dict[str, str]:
    grids = {source.task: {stack: grid.tolist() for stack, grid in source.usage.items()} for source in sources}
    return {task: corpus_hash(usage) for task, usage in grids.items()}


def other_shares(c: SimpleNamespace, sources: list[Source]) -> list[dict[str, list[float]]]:
    """Of each source, per stack and sparse layer, what `c.shares` shares the experts out by in place of the entropies."""
    shares: list[dict[str, list[float]]] = []
    for number, source in enumerate(sources):
        shares.append({})
        random = torch.Generator().manual_seed(1000 * c.seed + number)
        for stack, usage in source.usage.items():
            if c.shares == "inverse":
                values = 1 / normalized_entropy(usage).clamp_min(1e-6)
            elif c.shares == "tokens":
                values = usage.sum(-1)
            elif c.shares == "random":
                values = torch.rand(len(usage), generator=random)
            else:  # a task's name: all but the least go to it
                values = torch.full((len(usage),), float(source.task == c.shares))
            shares[-1][stack] = values.tolist()
    return shares


def _warn_of_no_entropy(record: dict[str, Any]) -> None:
    """Say in which layers no source has any entropy: there is nothing to share by, and the share is even."""
    for stack, of_sources in record.get("entropies", {}).items():
        for layer, entropies in enumerate(zip(*of_sources, strict=True), 1):  # of the sources
            if not any(entropies):
                said = f"{stack} sparse layer {layer}: every task uses one expert only (entropy 0); experts are shared evenly"
                warnings.warn(said, stacklevel=2)


def allocation_lines(record: dict[str, Any], tasks: tuple[str, ...]) -> str:
    """Experts a task in each sparse layer, and the weights of all else, for people to read."""
    lines = []
    for stack, layers in record["allocation"].items():
        for layer, counts in enumerate(layers):
            shares = ", ".join(f"{task} {n}" for task, n in zip(tasks, counts, strict=True))
            lines.append(f"{stack}, sparse layer {layer + 1}: experts from {shares}")
        weights = ", ".join(f"{task} {w:.3f}" for task, w in zip(tasks, record["weights"][stack], strict=True))
        lines.append(f"{stack}, all else averaged with weights {weights}")
    return "\n".join(lines)
