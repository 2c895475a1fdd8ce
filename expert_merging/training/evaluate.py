"""Scores of a model on every task, without training it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.data.scores import pack
from expert_merging.data.tasks import get_task
from expert_merging.run import results, sharding
from expert_merging.training.families import family_of
from expert_merging.training.overall import SCORED_WITH, overall


def shown(features, predictions: list[str], tokenizer, number: int = 8) -> list[dict[str, Any]]:
    """A few test examples with what the model wrote, for people to read."""
    return [
        {
            "input": tokenizer.decode(features[i]["input_ids"], skip_special_tokens=True)[:600],
            "prediction": predictions[i],
            "references": features[i]["references"],
        }
        for i in range(min(number, len(features)))
    ]


def on_split(
    c: SimpleNamespace, accelerator, model, tokenizer, data, split: str, label: str
) -> dict[str, dict[str, Any]]:
    """{task: its "scores" on a split, "each" example's main score, packed, the experts' "usage" there,
    {stack: [sparse layer][expert]}, as the model was told to count, and a few "examples"}."""
    found, family = {}, family_of(model)
    for task, features in data.items():
        family.reset_usage(model)
        scores, predictions = family.evaluate_task(
            model, features[split], get_task(task), tokenizer, c, accelerator, f"{label} {task}"
        )
        counted = family.read_usage(model, accelerator)
        scores["loss"] = family.task_loss(model, features[split], tokenizer, c, accelerator)
        each = pack(get_task(task).score_each(predictions, features[split]["references"]))
        examples = shown(features[split], predictions, tokenizer)
        found[task] = {"scores": scores, "each": each, "usage": counted, "examples": examples}
    return found


def scoring_identity(c: SimpleNamespace, data: dict[str, str], goals: dict | None, **model: Any) -> dict[str, Any]:
    """What the scores of a model depend on: the constants `SCORED_WITH`, the data (each task's hash), what Overall divides
    by, and the `model`, by whatever tells it from others."""
    return results.identity(c, SCORED_WITH, data=data, goals=goals, **model)


def test_once(
    c: SimpleNamespace, accelerator, model, tokenizer, data, goals, path: Path, identity: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Scores of `model` as it is; noted in `path`, and read from there when they are there and have this identity.

    {"validation": {task: scores}, "test": ..., "test_each": {task: packed}, "overall": {"validation": number, "test": ...}}
    """
    if results.part(path, identity) is None:
        model = sharding.place(accelerator, model)
        result: dict[str, Any] = {"overall": {}}
        for split in ("validation", "test"):
            found = on_split(c, accelerator, model, tokenizer, data, split, f"{split}:")
            result[split] = {task: one["scores"] for task, one in found.items()}
            if split == "test":
                result["test_each"] = {task: one["each"] for task, one in found.items()}
            result["overall"][split] = goals and overall(result[split], goals[split])
        if accelerator.is_main_process:
            results.save(path, identity, result)
        accelerator.wait_for_everyone()
    written = results.part(path, identity)
    assert written is not None  # above, where it was not there
    return written
