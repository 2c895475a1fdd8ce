"""Test-time adaptation: train a few parameters on unlabelled inputs by the entropy of the predictions.

For WEMoE the parameters are those of the routers (arXiv 2402.00433, section 3.3), for AdaMerging the coefficients of the
task vectors (arXiv 2310.02575). What a task's loss is, the caller says.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError
from expert_merging.core.files import replacing
from expert_merging.run import results

GUARDS = ("warn", "rollback", "off")
SAVE_EVERY = 50  # steps


def entropy(logits: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """-sum_c p_c log(p_c + eps) with p = softmax, in nats: logits [..., C] to [...]."""
    probabilities = logits.float().softmax(dim=-1)
    return -(probabilities * (probabilities + eps).log()).sum(dim=-1)


def entropy_loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `adapt` asks of a loss, for logits [batch, C]: mean entropy, and the mean prediction [C]."""
    return entropy(logits).mean(), logits.detach().float().softmax(dim=-1).mean(dim=0)


def batch_at(step: int, examples: int, batch_size: int, seed: int) -> list[int]:
    """Which examples form the batch of a step: epoch after epoch in a new order, the last batch of an epoch shorter.

    A function of its arguments alone, so that a run that goes on sees what it would have seen.
    """
    epoch, number = divmod(step, math.ceil(examples / batch_size))
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    return order[number * batch_size : (number + 1) * batch_size].tolist()


def neighbours_at(step: int, examples: int, batch_size: int, seed: int) -> list[int]:
    """Likewise, but a batch is a run of examples, such as texts of like length; the runs come in a new order each epoch."""
    epoch, number = divmod(step, math.ceil(examples / batch_size))
    order = torch.randperm(
        math.ceil(examples / batch_size), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)
    )
    start = int(order[number]) * batch_size
    return list(range(start, min(start + batch_size, examples)))


def check_guard(guard: str, floor: float = 0.5) -> None:
    """Raises UserError for an unknown guard, and for a floor that is no share."""
    if guard not in GUARDS:
        raise UserError(f"the guard is {guard!r}; it must be one of {', '.join(GUARDS)}")
    if not 0 <= floor <= 1:
        raise UserError(f"the guard's floor is {floor}; it is a share, between 0 and 1")


def adapt(
    parameters: Iterable[torch.nn.Parameter],
    tasks: Sequence[str],
    loss: Callable[[str, int], tuple[torch.Tensor, torch.Tensor | None]],
    steps: int = 1000,
    lr: float = 1e-4,
    guard: str = "warn",
    floor: float = 0.5,
    window: int = 20,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
    title: str = "adapting",
) -> dict[str, Any]:
    """Minimise the sum over tasks of `loss` by Adam at a constant rate; changes `parameters` in place.

    The backward pass goes task by task, which gives the gradient of the sum and holds one graph at a time.

    A task has collapsed when the model gives (nearly) all of its inputs the same answer. Entropy, the loss, is lowest then,
    so it cannot tell; the entropy of the mean prediction over `window` steps can. The guard compares it with the first
    window's: below `floor` times that, it warns ("warn"), or restores the parameters of the last window in which no
    task had collapsed, and stops ("rollback").

    Args:
        parameters: those to train; they need gradients.
        loss: (task, step) -> (scalar in nats, mean prediction [C] for the guard, or None). The step is what the batch
            depends on; see `batch_at`.
        checkpoint: a file from which an interrupted adaptation goes on; removed at the end.
        identity: what the result depends on beside these arguments; it is refused to go on from another's checkpoint.

    Returns:
        A record: losses by task and step, entropy of the mean prediction by task and window (share of log C), what the
        guard saw, seconds.

    Raises UserError for an unknown guard or floor, another's checkpoint and a loss that is no number, ValueError where there is
    nothing to train.
    """
    parameters = list(parameters)
    check_guard(guard, floor)
    if not parameters or not all(parameter.requires_grad for parameter in parameters):
        raise ValueError("there is no parameter to adapt, or one without gradients")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    settings = {"steps": steps, "lr": lr, "guard": guard, "floor": floor, "window": window}
    identity = {"tasks": list(tasks), **settings, **(identity or {})}
    record: dict[str, Any] = {
        **settings, "seconds": 0.0, "steps_done": 0,
        "loss": {task: [] for task in tasks}, "marginal_entropy": {task: [] for task in tasks}, "collapsed": [],
    }  # fmt: skip
    predictions: dict[str, list[torch.Tensor]] = {task: [] for task in tasks}
    healthy = _copies(parameters)
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=parameters[0].device)
        remedy = "it holds an adaptation that was begun: restore them or remove it"
        results.refuse(checkpoint, results.made_with(saved), identity, remedy)
        record, healthy = saved["record"], saved["healthy"]
        predictions = {task: [one.cpu() for one in of_task] for task, of_task in saved["predictions"].items()}
        optimizer.load_state_dict(saved["optimizer"])
        _restore(parameters, saved["parameters"])
    started = time.monotonic() - record["seconds"]
    bar = progress_bar(range(record["steps_done"], steps), title, initial=record["steps_done"], total=steps)
    for step in bar:
        optimizer.zero_grad(set_to_none=True)
        for task in tasks:
            value, prediction = loss(task, step)
            if not torch.isfinite(value):
                raise UserError(f"adapting: the loss of {task} is {value.item()} at step {step}; lower the rate")
            value.backward()
            record["loss"][task].append(round(value.item(), 6))
            if prediction is not None:
                predictions[task].append(prediction.detach().cpu())
        optimizer.step()
        record["steps_done"], record["seconds"] = step + 1, time.monotonic() - started
        bar.set_postfix(loss=f"{sum(values[-1] for values in record['loss'].values()):.3f}", refresh=False)
        if (step + 1) % window == 0 and guard != "off":
            collapsed = _collapsed(predictions, record, floor)
            for task in collapsed:
                if task not in [one["task"] for one in record["collapsed"]]:
                    record["collapsed"].append({"task": task, "step": step + 1})
                    warnings.warn(
                        f"{task}: by step {step + 1} most inputs get one answer; adapt more gently, or guard by rollback",
                        stacklevel=2,
                    )
            if not collapsed:
                healthy = _copies(parameters)
            elif guard == "rollback":
                _restore(parameters, healthy)
                record["rolled_back_to"] = max(0, step + 1 - window)
                break
        if checkpoint is not None and (step + 1) % SAVE_EVERY == 0:
            with replacing(checkpoint) as temporary:
                saved = {"identity": identity, "record": record, "predictions": predictions, "healthy": healthy}
                torch.save(saved | {"optimizer": optimizer.state_dict(), "parameters": _copies(parameters)}, temporary)
    optimizer.zero_grad(set_to_none=True)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return record


def _collapsed(predictions: dict[str, list[torch.Tensor]], record: dict[str, Any], floor: float) -> list[str]:
    """Note the entropy of each task's mean prediction since the last time; the tasks where it has fallen too low."""
    found = []
    for task, held in predictions.items():
        if not held:
            continue
        mean = torch.stack(held).mean(dim=0)
        held.clear()
        share = (-torch.xlogy(mean, mean).sum() / math.log(max(len(mean), 2))).item()
        record["marginal_entropy"][task].append(round(share, 4))
        if share < floor * record["marginal_entropy"][task][0]:
            found.append(task)
    return found


def _copies(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _restore(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
