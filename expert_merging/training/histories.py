"""The history of a fine-tuning run: what its epochs and its test came to, as its JSON file holds it."""

from typing import Any

import torch

from expert_merging.data.tasks import get_task
from expert_merging.run import sharding
from expert_merging.switch.usage import per_stack
from expert_merging.training import checkpoints
from expert_merging.training.families import family_of
from expert_merging.training.overall import overall


def history_of(
    accelerator, model, name: str, started: str, epochs: list[dict[str, Any]], tested: dict[str, dict[str, Any]],
    goals: dict[str, dict[str, float]] | None, more: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """
    Args:
        epochs: of each its "selection", "seconds", and by task the validation "scores", the "usage" there, and, where it was
            tested, "test"; "train_loss" where it was trained here.
        tested: {task: {"scores", "each", "examples"}} of the best epoch on the test split.
        goals: {split: {task: score of the single-task model}}, by which Overall is measured.
        more: further entries.
    """
    best = checkpoints.best_epoch(epochs)
    history = {
        "name": name, "started": started,
        "device": str(accelerator.device.type), "processes": accelerator.num_processes, "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision, "sharded": sharding.is_sharded(model),
        "seconds": sum(epoch["seconds"] for epoch in epochs),
        "parameters": model.num_parameters(),
        "experts_num": family_of(model).experts_of(model.config), "tasks": list(tested),
        "train_loss": [epoch["train_loss"] for epoch in epochs if "train_loss" in epoch],
        "epoch_seconds": [epoch["seconds"] for epoch in epochs],
        "best_epoch": best + 1,
        "selection": [epoch["selection"] for epoch in epochs],
        **{
            f"{task}_data": {
                "main_score": get_task(task).main_score,
                "validation": [epoch["scores"][task] for epoch in epochs],
                "test": result["scores"],
                "test_each": result["each"],
                "test_epochs": [epoch["test"][task]["scores"] for epoch in epochs if epoch["test"]],
                "examples": result["examples"],
            }
            for task, result in tested.items()
        },
        **per_stack(epochs[best]["usage"]),
        **more,
    }  # fmt: skip
    if goals:
        scores = {task: result["scores"] for task, result in tested.items()}
        validation = overall(epochs[best]["scores"], goals["validation"])
        history["overall"] = {"validation": validation, "test": overall(scores, goals["test"])}
    return history
