"""What tools/import_released.py does: find a released model, load it, measure it as after an epoch, and write it."""

import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.files import sha256
from expert_merging.data import features
from expert_merging.run import results
from expert_merging.run.deviations import of_method
from expert_merging.switch import models
from expert_merging.training import families, finetuning, overall, released_models
from expert_merging.training.evaluate import on_split
from expert_merging.training.histories import history_of
from expert_merging.training.overall import summary
from expert_merging.training.released_history import as_released

_OWN = ("released_folder", "released_run", "epoch", "num_expert", "task_type")  # constants of the tool that tell where


@dataclass(frozen=True)
class Released:
    """A released model and where it goes: its .pt, its released history, the pre-trained model, its tasks' features, what
    Overall divides by, and what the new history depends on."""

    name: str
    weights: Path
    past: Any
    base: Any
    tokenizer: Any
    data: dict[str, Any]
    goals: dict[str, dict[str, float]] | None
    identity: dict[str, Any]
    folder: Path
    history: Path


def find(c: SimpleNamespace, experts: int) -> Released:
    """The model that the constants name. Raises UserError where anything that it needs is missing or damaged."""
    source, name = Path(c.released_folder), c.released_run or f"single_task_{c.task_type}"
    weights = source / (f"{name}_ep{c.epoch}.pt" if c.released_run else f"{name}.pt")
    released_models.read_weights(weights)  # before anything else is asked for
    tokenizer = models.base_tokenizer(c, experts)
    data = {task: features.load(task, c, tokenizer) for task in (c.task_types if c.released_run else [c.task_type])}
    base, ancestor = families.load_base(c, experts)
    past, goals = released_models.read_history(source / f"{name}.pkl"), None
    if c.released_run:
        folder, histories = Path(c.MODEL_SAVE_PATH), Path(c.PICKLE_PATH)
        goals = overall.single_task_goals(c.SOURCE_PICKLE_PATH.format(experts=experts), c.task_types, experts, c)
    else:
        folder, histories = (
            Path(p.format(experts=experts)) for p in (c.SOURCE_MODEL_WEIGHT_PATH, c.SOURCE_PICKLE_PATH)
        )
    kept = SimpleNamespace(**{constant: value for constant, value in vars(c).items() if constant not in _OWN})
    starts = {} if "CAEM" in name else {"ancestor": ancestor}  # a merged model starts from what merging gives
    hashes = finetuning.data_hashes(c, list(data))
    identity = results.identity(kept, data=hashes, goals=goals, imported=sha256(weights), base=ancestor, **starts)
    return Released(name, weights, past, base, tokenizer, data, goals, identity, folder, histories / f"{name}.json")


def load(released: Released) -> tuple[Any, dict[str, Any]]:
    """(the model, how near it is to the pre-trained one). Raises UserError where it does not fit or cannot come from it."""
    state = released_models.read_weights(released.weights)
    model = released_models.build_model(released.weights, state, released.base)
    return model, released_models.kinship(released.weights, state, released.base)


def measure(c: SimpleNamespace, accelerator, released: Released, model) -> dict[str, Any]:
    """The history of the model, as of a run of one epoch: its scores and usage on validation, and its test scores."""
    started, before = time.strftime("%Y-%m-%d %H:%M"), time.monotonic()
    model = model.to(accelerator.device).eval()
    model.set_usage_counting(of_method(c.reading, "counts"))
    on_validation = on_split(c, accelerator, model, released.tokenizer, released.data, "validation", "validation:")
    tested = on_split(c, accelerator, model, released.tokenizer, released.data, "test", "test:")
    scores = {task: found["scores"] for task, found in on_validation.items()}
    goals = released.goals["validation"] if released.goals else None
    epoch = {
        "selection": overall.overall(scores, goals), "scores": scores, "test": {},
        "usage": {task: found["usage"] for task, found in on_validation.items()}, "seconds": time.monotonic() - before,
    }  # fmt: skip
    more = {"released": {"file": released.weights.name, "history": released.past}}
    return history_of(accelerator, model, released.name, started, [epoch], tested, released.goals, more)


def save(accelerator, released: Released, model, history: dict[str, Any]) -> None:
    """Write the model folder, the .pt and the history, the last with its .pkl in the released shapes."""
    if accelerator.is_main_process:
        released.folder.mkdir(parents=True, exist_ok=True)
        models.save_state_dict(model, released.folder / released.weights.name)
        models.save_model(model, released.tokenizer, released.folder / released.name)
        usage = [{task: {s: grid[task] for s, grid in history["usage"].items()} for task in history["tasks"]}]
        results.save(released.history, released.identity, history, as_released(history, usage, released.goals))
    accelerator.wait_for_everyone()
    accelerator.print(summary(history))
