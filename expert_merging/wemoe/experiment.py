"""Merging single-task models without training them jointly: each method's model is made, tested and noted once."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder
from expert_merging.core.safetensors_folder import SafetensorsFolder, write_tensors
from expert_merging.data.features import collate
from expert_merging.data.tasks import get_task
from expert_merging.merging.registry import Method
from expert_merging.run import results
from expert_merging.switch import decoding
from expert_merging.switch.cross_entropy import task_loss
from expert_merging.training import evaluate, finetuning, overall
from expert_merging.wemoe import checkpoints, seq2seq
from expert_merging.wemoe.ffn import ensembles
from expert_merging.wemoe.sources import Sources, load_seq2seq

# What the results of methods that adapt depend on besides the constants of their rows.
_ADAPTATION = (
    "lam", "seed", "adapt_losses", "adapt_tokens", "adapt_steps", "adapt_batch_size", "adapt_guard", "adapt_window",
    "train_sample", "train_examples",
)  # fmt: skip
DEPENDS_ON = {
    "coefficients": (*_ADAPTATION, "coefficient_lr"),
    "routers": (*_ADAPTATION, "router_lr", "router_depth"),
}


def make_once(sources: Sources, folder: Path, identity: dict[str, Any], method: Method) -> dict[str, Any]:
    """Merge by `method` into `folder`, unless it is there with this identity. Returns its record, with the numbers
    of parameters and the bytes that its weights take on disk (of a WEMoE the pre-trained model's, which it builds on, too).
    """
    if (record := results.part(folder / "merging.json", identity)) is not None:
        return record
    started = time.perf_counter()
    sources.checkpoint, sources.identity = folder.with_name(f"{folder.name}.adapting"), identity
    try:
        made = sources.merge(method)
        with new_folder(folder) as temporary:
            if isinstance(made.result, nn.Module):
                checkpoints.save(made.result, temporary / "wemoe")
                parameters = _ensemble_parameters(made.result)
            else:
                write_tensors(made.result, temporary)
                parameters = sum(tensor.numel() for tensor in SafetensorsFolder(temporary).values())
            held = sum(file.stat().st_size for file in temporary.rglob("*.safetensors"))
            if isinstance(made.result, nn.Module):
                held += sum(t.numel() * t.element_size() for t in sources.base.values())
            sources.model.config.save_pretrained(temporary)
            sources.tokenizer.save_pretrained(temporary)
            record = {"parameters": parameters, "bytes": held, "trainable": 0, **made.record}
            record.setdefault("seconds_to_merge", time.perf_counter() - started)
            results.save(temporary / "merging.json", identity, record)
    except ValueError as error:
        raise UserError(f"these models cannot be merged: {error}") from error
    return record


def _ensemble_parameters(model: nn.Module) -> int:
    """Parameters of the model with its routers, and the elements of task vectors that are held."""
    vectors = sum(sum(one.nonzeros()) for _, layer in ensembles(model) for one in layer.vectors)
    return sum(parameter.numel() for parameter in model.parameters()) + vectors


def load_made(sources: Sources, folder: Path) -> nn.Module:
    """The model that `make_once` left in `folder`."""
    if (folder / "wemoe").is_dir():
        return seq2seq.route(checkpoints.load(sources.model, folder / "wemoe")).eval()
    return load_seq2seq(folder, "MODEL_SAVE_PATH").eval()


def test_once(sources: Sources, accelerator, folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Scores of the model in `folder` on test as the other scripts have them, in batches of one task; of a WEMoE also in
    batches of all tasks together, and its routing. Noted in `folder`, and read from there when they are there with this
    identity.

    {"test": {task: scores}, "overall": {"test": number}, "seconds_to_test"} and of a WEMoE "mixed", "overall"."mixed",
    "routing": {layer: {task: mean weights}}.
    """
    path = folder / "test.json"
    if (result := results.part(path, identity)) is not None:
        return result
    c, tokenizer = sources.c, sources.tokenizer
    model = load_made(sources, folder).to(accelerator.device)
    result = {"test": {}, "examples": {}, "overall": {}}
    started = time.perf_counter()
    for task, features in sources.data.items():
        scores, predictions = decoding.evaluate_task(
            model, features["test"], get_task(task), tokenizer, c, accelerator, f"test: {task}"
        )
        result["test"][task] = scores
        result["examples"][task] = evaluate.shown(features["test"], predictions, tokenizer)
    result["seconds_to_test"] = time.perf_counter() - started
    for task, features in sources.data.items():
        result["test"][task]["loss"] = task_loss(model, features["test"], tokenizer, c, accelerator)
    if any(True for _ in ensembles(model)):
        result["mixed"] = mixed_scores(sources, accelerator, model)
        result["routing"] = routing(sources, model)
    for kind in ("test", "mixed"):
        if kind in result and sources.goals:
            result["overall"][kind] = overall.overall(result[kind], sources.goals["test"])
    results.save(path, identity, result)
    return result


def mixed_scores(sources: Sources, accelerator, model: nn.Module) -> dict[str, dict[str, float]]:
    """{task: scores} where every batch holds examples of all tasks in equal parts, as far as there are.

    Of each task the longest come first, so that a batch wastes little on padding.
    """
    from datasets import concatenate_datasets

    c, tests = sources.c, {task: features["test"] for task, features in sources.data.items()}
    places, first = [], 0
    for test in tests.values():
        lengths = [len(ids) for ids in test["input_ids"]]
        longest = sorted(range(len(test)), key=lambda row: (-lengths[row], row))
        places += [(rank / len(test), first + row) for rank, row in enumerate(longest)]
        first += len(test)
    rows, together = [row for _, row in sorted(places)], concatenate_datasets(list(tests.values()))
    texts: dict[int, str] = {}
    for start in range(0, len(rows), c.eval_batch_size):
        batch = rows[start : start + c.eval_batch_size]
        label = f"mixed batches: {start}/{len(rows)}"
        with accelerator.autocast():  # as `evaluate_task` does
            made = decoding.generate(
                model, together.select(batch), sources.tokenizer, c, accelerator.device, len(batch), label
            )
        texts |= {batch[i]: text for i, text in made.items()}
    scores, first = {}, 0
    for task, test in tests.items():
        scores[task] = get_task(task).score([texts[first + i] for i in range(len(test))], test["references"])
        first += len(test)
    return scores


@torch.no_grad()
def routing(sources: Sources, model: nn.Module, examples: int = 64) -> dict[str, dict[str, list[float]]]:
    """{layer: {task: mean weight of each task vector}} over the first test examples, batches of one task."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name, _ in ensembles(model)}
    for task, features in sources.data.items():
        ids = features["test"][:examples]["input_ids"]
        totals: dict[str, torch.Tensor] = {}
        for start in range(0, len(ids), 16):
            part = [{"input_ids": one, "labels": [0]} for one in ids[start : start + 16]]
            batch = collate(part, sources.tokenizer.pad_token_id)
            inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            begin = torch.full((len(part), 1), model.config.decoder_start_token_id, device=model.device)
            model(**inputs, decoder_input_ids=begin, use_cache=False)
            for name, weights in seq2seq.routing_weights(model).items():
                totals[name] = totals.get(name, 0) + weights.expand(len(part), -1).sum(dim=0).cpu()
        for name, total in totals.items():
            found[name][task] = [round(value, 5) for value in (total / len(ids)).tolist()]
    return found


def identity_of(sources: Sources, method: Method) -> dict[str, Any]:
    """What a method's result depends on: the constants that the test sees and the method's own, the models and the data."""
    c = sources.c
    shared = (
        "scale", "task_types", "max_input_length", "max_decoder_length", "test_examples", "num_beams", "repetition_penalty",
        "no_repeat_ngram_size", "length_penalty", "precision", "experts_num",
    )  # fmt: skip
    own = [constant.name for constant in method.constants] + list(DEPENDS_ON.get(method.adapts, ()))
    own += ["statistics_examples", "seed", "train_sample", "train_examples"] if method.statistics else []
    own += ["eval_batch_size"] if method.settings.get("routing") == "batch" else []
    digests = dict(zip(sources.tasks, (one.sha256() for one in sources.tuned), strict=True))
    return results.identity(
        c, (*shared, *own), method=method.name, ancestor=sources.ancestor, sources=digests, goals=sources.goals,
        data=finetuning.data_hashes(c, list(sources.tasks)),
    )  # fmt: skip


def finish(
    sources: Sources, accelerator, name: str, method: str, identity: dict[str, Any], made: dict[str, Any],
    tested: dict[str, Any],
) -> str:  # fmt: skip
    """Write a method's history, and of a WEMoE the heat map of its routing; returns what it says in a line."""
    c = sources.c
    history: dict[str, Any] = {
        "name": name, "method": method, "started": time.strftime("%Y-%m-%d %H:%M"),
        "device": str(accelerator.device.type), "processes": 1, "threads": torch.get_num_threads(),
        "experts_num": c.experts_num, "tasks": list(sources.tasks),
        **made,
        **{
            f"{task}_data": {
                "main_score": get_task(task).main_score, "test": tested["test"][task],
                **({"mixed": tested["mixed"][task]} if "mixed" in tested else {}), "examples": tested["examples"][task],
            }
            for task in sources.tasks
        },
        **{key: tested[key] for key in ("overall", "routing", "seconds_to_test") if key in tested},
    }  # fmt: skip
    if "routing" in tested:
        from expert_merging.report import figures

        figures.routing(history, Path(c.PICKLE_PATH) / f"{name}_routing.png")
    results.save(f"{c.PICKLE_PATH}/{name}.json", identity, history)
    return f"{method}: " + overall.scores_line(tested["test"], tested["overall"].get("test"))
