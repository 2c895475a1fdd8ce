"""Scores of a model on every task, without training it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.files import read_json, write_json
from expert_merging.data.tasks import get_task
from expert_merging.run import sharding
from expert_merging.switch import decoding
from expert_merging.switch.cross_entropy import task_loss
from expert_merging.training.overall import overall


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


def test_once(c: SimpleNamespace, accelerator, model, tokenizer, data, goals, path: Path) -> dict[str, Any]:
    """Scores of `model` as it is; noted in `path`, and read from there when they are there.

    {"validation": {task: scores}, "test": ..., "overall": {"validation": number, "test": ...}}
    """
    if not path.exists():
        model = sharding.place(accelerator, model)
        result: dict[str, Any] = {"overall": {}}
        for split in ("validation", "test"):
            result[split] = {}
            for task, features in data.items():
                scores, _ = decoding.evaluate_task(
                    model, features[split], get_task(task), tokenizer, c, accelerator, f"{split}: {task}"
                )
                scores["loss"] = task_loss(model, features[split], tokenizer, c, accelerator)
                result[split][task] = scores
            result["overall"][split] = goals and overall(result[split], goals[split])
        if accelerator.is_main_process:
            write_json(path, result)
        accelerator.wait_for_everyone()
    return read_json(path)
