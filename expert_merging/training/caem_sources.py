"""CAEM from the folders and histories that single_task_finetune.py leaves (paper, Algorithm 1).

The method itself - entropy, allocation, merging - is in caem_files/modeling_switch_transformers.py, as pure functions.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import merge_lazily, merged_config

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder
from expert_merging.core.hub import load_tokenizer
from expert_merging.core.safetensors_folder import SafetensorsFolder, write_tensors
from expert_merging.merging.average import average_lazily
from expert_merging.run import results
from expert_merging.run.deviations import deviates, of_method
from expert_merging.switch.usage import STACKS
from expert_merging.training.overall import single_task_history

_USAGE_KEYS = {"encoder": "expert_usage_grid", "decoder": "expert_usage_grid_de"}


@dataclass
class Source:
    """A single-task model to merge: its folder, and its expert usage on validation, {stack: tensor [layer, expert]}."""

    task: str
    folder: Path
    config: SwitchTransformersConfig
    usage: dict[str, torch.Tensor]
    weights_sha256: list[str]
    ancestor: str
    tokenizer: Any = None


def open_sources(c: SimpleNamespace, tasks: tuple[str, ...], experts: int, target_experts: int) -> list[Source]:
    """The single-task models of `tasks`, checked to fit together.

    Raises UserError where one is missing, damaged, of another ancestor, shape or number of experts, or without usage; and
    when `target_experts` is out of range or `c.merging` unknown.
    """
    if c.merging not in ("caem", "average"):
        raise UserError(f"merging is {c.merging!r}; it must be caem or average")
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
    first.tokenizer = load_tokenizer(str(first.folder), "SOURCE_MODEL_WEIGHT_PATH")
    return sources


def _open_source(c: SimpleNamespace, task: str, experts: int) -> Source:
    folder = Path(c.SOURCE_MODEL_WEIGHT_PATH.format(experts=experts)) / f"single_task_{task}"
    history = single_task_history(c.SOURCE_PICKLE_PATH.format(experts=experts), task, experts, c)
    digests = SafetensorsFolder(folder).sha256()
    config = SwitchTransformersConfig.from_pretrained(folder)
    if config.num_experts != experts:
        raise UserError(f"{folder} has {config.num_experts} experts a sparse layer; source_experts_num is {experts}")
    try:
        usage = {stack: torch.tensor(grid) for stack, grid in _usage(c, history, task, experts).items()}
        ancestor = history["identity"]["ancestor"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the history of {folder} lacks expert usage ({error}); run: "
            f"python single_task_finetune.py --scale {c.scale} --task_type {task} --num_expert {experts}"
        ) from error
    for stack in STACKS:
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


def _usage(c: SimpleNamespace, history: dict[str, Any], task: str, experts: int) -> dict[str, list[list[int]]]:
    """{stack: grid} counted as the reading asks: by the training run, or afterwards by tools/count_expert_usage.py."""
    if deviates(c.reading, "counts") == deviates(history["identity"]["reading"], "counts"):
        return {stack: history[key][task] for stack, key in _USAGE_KEYS.items()}
    counted = counted_usage(c, task, experts)
    wanted = (of_method(c.reading, "counts"), c.max_input_length)
    return next(row["usage"] for row in counted["rows"] if (row["counting"], row["input_length"]) == wanted)


def counted_usage(c: SimpleNamespace, task: str, experts: int) -> dict[str, Any]:
    """What tools/count_expert_usage.py left for a single-task model. Raises UserError where it did not run."""
    remedy = f"python tools/count_expert_usage.py --scale {c.scale} --task_type {task} --num_expert {experts} --seed {c.seed}"
    return results.load(f"{c.SOURCE_PICKLE_PATH.format(experts=experts)}/expert_usage_{task}.json", remedy)


def merge_sources(c: SimpleNamespace, accelerator, sources: list[Source], folder: Path) -> dict[str, Any]:
    """Merge `sources` into the Hugging Face folder `folder` with `c.target_experts_num` experts a sparse layer.

    `c.merging` is "caem" or, as a control, "average": every tensor averaged, experts slot by slot. Returns the record
    that goes into the history; for CAEM each stack's entropies, the experts each task got in each layer
    (record_stay_num_experts_en / _de) and the tasks' weights.

    Raises UserError where the sources' tensors do not fit together.
    """
    identity, path = merging_identity(c, sources), folder / "merging.json"
    if accelerator.is_main_process and results.part(path, identity) is None:
        weights = [SafetensorsFolder(source.folder) for source in sources]
        with new_folder(folder) as temporary:
            try:
                if c.merging == "average":
                    tensors, record, projection = average_lazily(weights), {}, "paper"
                else:
                    rule, projection = of_method(c.reading, "allocation"), of_method(c.reading, "projection")
                    usage = [source.usage for source in sources]
                    record, tensors = merge_lazily(weights, usage, c.target_experts_num, c.alpha, rule, projection)
                    _warn_of_no_entropy(record)
                    record = _as_history(record)
                write_tensors(tensors, temporary)
            except ValueError as error:
                raise UserError(f"these models cannot be merged: {error}") from error
            merged_config(sources[0].config, c.target_experts_num, projection).save_pretrained(temporary)
            sources[0].tokenizer.save_pretrained(temporary)
            results.save(temporary / "merging.json", identity, record)
    accelerator.wait_for_everyone()
    record = results.part(path, identity)
    if c.merging == "caem":
        accelerator.print(allocation_lines(record, tuple(source.task for source in sources)))
    return record


def merging_identity(c: SimpleNamespace, sources: list[Source]) -> dict[str, Any]:
    """What the merged model depends on."""
    return {
        "sources": {source.task: source.weights_sha256 for source in sources},
        "target_experts": c.target_experts_num, "alpha": c.alpha, "reading": c.reading, "merging": c.merging,
    }  # fmt: skip


def _warn_of_no_entropy(record: dict[str, Any]) -> None:
    """Say in which layers no source has any entropy: there is nothing to share by, and the share is even."""
    for stack in STACKS:
        for layer, entropies in enumerate(zip(*record[stack]["entropies"], strict=True), 1):  # of the sources
            if not any(entropies):
                said = f"{stack} sparse layer {layer}: every task uses one expert only (entropy 0); experts are shared evenly"
                warnings.warn(said, stacklevel=2)


def _as_history(record: dict[str, Any]) -> dict[str, Any]:
    """The merging record under the released code's keys."""
    return {
        "record_stay_num_experts_en": record["encoder"]["allocation"],
        "record_stay_num_experts_de": record["decoder"]["allocation"],
        "entropies": {stack: record[stack]["entropies"] for stack in STACKS},
        "experts": {stack: record[stack]["experts"] for stack in STACKS},
        "weights": {stack: record[stack]["weights"] for stack in STACKS},
    }


def allocation_lines(record: dict[str, Any], tasks: tuple[str, ...]) -> str:
    """Experts a task in each sparse layer, and the weights of all else, for people to read."""
    lines = []
    for stack, key in (("encoder", "en"), ("decoder", "de")):
        for layer, counts in enumerate(record[f"record_stay_num_experts_{key}"]):
            shares = ", ".join(f"{task} {n}" for task, n in zip(tasks, counts, strict=True))
            lines.append(f"{stack}, sparse layer {layer + 1}: experts from {shares}")
        weights = ", ".join(f"{task} {w:.3f}" for task, w in zip(tasks, record["weights"][stack], strict=True))
        lines.append(f"{stack}, all else averaged with weights {weights}")
    return "\n".join(lines)
