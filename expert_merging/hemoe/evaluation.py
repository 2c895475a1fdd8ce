"""What a dense model or a mixture is worth: accuracy by lm_eval, loss on held-out answers, and the share it activates."""

import contextlib
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError
from expert_merging.core.hub import first_line
from expert_merging.data.scores import pack
from expert_merging.hemoe import questions
from expert_merging.hemoe.modeling import HEMoEForCausalLM, activated_share
from expert_merging.hemoe.output_matrix import before_targets, logits_at


def load_tasks(names: Sequence[str], folder: str = "") -> dict[str, dict[str, Any]]:
    """The tasks as lm_eval's `TaskManager.load` gives them, 0-shot; those of `folder` (YAML files) before lm_eval's own.

    Raises UserError for a name that neither has, and where a task's data cannot be had.
    """
    if folder and not Path(folder).is_dir():
        raise UserError(
            f"EVAL_TASKS_PATH: there is no folder {folder}; run the step base first, or name lm_eval's own tasks"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or set(names) - set(manager.all_tasks):
        manager = TaskManager(include_path=folder or None)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise UserError(
            f"eval_tasks: neither lm_eval nor {folder or 'EVAL_TASKS_PATH'} has a task {', '.join(unknown)}"
        )
    for name in names:
        questions.check_place(Path(folder), name)
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # whatever the reader of a task's data raises
        raise UserError(f"eval_tasks: the data of {', '.join(names)} cannot be had ({first_line(error)})") from error
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    return loaded


def accuracy(
    model, tokenizer, tasks: dict[str, dict[str, Any]], batch_size: int, limit: int = 0
) -> dict[str, dict[str, Any]]:
    """What lm_eval finds, {task: {"main": acc_norm (by the likelihood a character) where the task has it, else acc; "acc" and
    "acc_norm" as there are; "each": the main one of each question, packed (data/scores.py)}}.

    Args:
        tasks: `load_tasks`'s.
        limit: examples of a task; 0 takes all.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from expert_merging.hemoe.shared_prompts import FAMILIES, SharedPrompts

    was_training = model.training
    model.eval()
    dense = model.config.dense if isinstance(model, HEMoEForCausalLM) else model.config.to_dict()
    settings = {"pretrained": model, "tokenizer": tokenizer, "backend": "causal", "batch_size": batch_size}
    settings["add_bos_token"] = True
    with progress_bar(desc="answers", unit="answer", leave=False) as bar, contextlib.redirect_stderr(io.StringIO()):
        # lm_eval's own bars, several a task, are not shown.
        lm = SharedPrompts(bar, **settings) if dense["model_type"] in FAMILIES else HFLM(**settings)
        found = evaluate(lm, tasks, limit=limit or None, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    model.train(was_training)
    return {task: _scores(found["results"][task], found["samples"][task]) for task in tasks["tasks"]}


def _scores(result: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    said = {name: result[f"{name},none"] for name in ("acc", "acc_norm") if f"{name},none" in result}
    main = "acc_norm" if "acc_norm" in said else "acc"
    each = [100.0 * sample[main] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    return {"main": said[main], **said, "each": pack(each)}


def measure(model, batches_of: Mapping[str, Iterable[dict[str, torch.Tensor]]]) -> dict[str, Any]:
    """{"loss": {domain: nats a target token}, "share": {domain: activated share of the mixtures' neurons, mean over real
    tokens and layers}, "share_by_layer": [MoE layers], "use": how often each expert fires [MoE layers, n]}.

    A dense model has the loss alone.
    """
    device = next(model.parameters()).device
    mixture = isinstance(model, HEMoEForCausalLM)
    result: dict[str, Any] = {"loss": {}, "share": {}} if mixture else {"loss": {}}
    tokens_of_all = 0
    by_layer: Any = 0  # a tensor from the first batch on, as `use`
    use: Any = 0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for domain, batches in batches_of.items():
            loss, targets, share, tokens = 0.0, 0, 0.0, 0
            for batch in batches:
                batch = {name: value.to(device) for name, value in batch.items()}
                rows, columns, wanted = before_targets(batch["labels"])
                with logits_at(model, rows, columns):
                    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                loss += torch.nn.functional.cross_entropy(output.logits[0].float(), wanted, reduction="sum").item()
                targets += len(wanted)
                if mixture:
                    real = batch["attention_mask"].bool()
                    of_tokens = activated_share(output.routing, model.config)[real].double()
                    share, tokens = share + of_tokens.mean(1).sum().item(), tokens + int(real.sum())
                    by_layer = by_layer + of_tokens.sum(0)
                    use = use + torch.stack([fired[real].sum(0) for fired in output.routing])
            result["loss"][domain] = loss / targets
            if mixture:
                result["share"][domain] = share / tokens
                tokens_of_all += tokens
    model.train(was_training)
    if mixture:
        result["share_by_layer"] = (by_layer / tokens_of_all).tolist()
        result["use"] = (use / tokens_of_all).tolist()
    return result
