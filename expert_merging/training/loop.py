"""The training loop: epochs of steps of passes, with checkpoints. It knows neither model nor task.

What one pass computes (`loss_of`), which passes make a step (`steps_of`) and what follows an epoch (`after_epoch`) are
handed in. Killed at any moment, the same call goes on from the last checkpoint and ends with the same weights, bit for
bit on CPU: a checkpoint holds weights, optimizer, random states and the place in the epoch, and a manifest: every
file's hash, what the run depends on, and the versions. An older one goes when the new one has been read back.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder
from expert_merging.data.batches import MicroBatches
from expert_merging.run import sharding
from expert_merging.training import checkpoints

_REMEDY = "lower lr and remove {folder} to begin again (it holds the last good checkpoint)"


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    num_epochs: int,
    steps_of: Callable[[int], Sequence[Sequence[Any]]],
    loss_of: Callable[[torch.nn.Module, Any], tuple[torch.Tensor, int]],
    after_epoch: Callable[[int], dict[str, Any]],
    folder: Path,
    checkpoint_minutes: float,
    max_grad_norm: float = 0.0,
    schedule: Callable[[int, int], float] | None = None,
    micro_batches: MicroBatches | None = None,
    label: str = "",
    each_epoch: bool = True,
) -> list[dict[str, Any]]:
    """Train `model` in place; the weights of the best epoch end up in `best_folder(folder, history)`.

    Args:
        steps_of: epoch -> its steps; a step is a list of passes, whatever `loss_of` understands.
        loss_of: (model, pass) -> (share of the step's loss, examples). The shares of a step's passes add up to its loss.
            Where a pass has a `task`, a loss that is no number names it.
        after_epoch: epoch -> what to note in the history; its "selection" (higher is better) chooses the best epoch.
        schedule: (epoch, step) -> factor on the optimizer's learning rate; None keeps it constant.
        each_epoch: a checkpoint after every epoch too, before and after its evaluation; without, only every
            `checkpoint_minutes`, for runs whose checkpoints would take as long as their epochs.
        micro_batches: cuts passes that do not fit in memory; a step's loss and examples stay the same. None, or several
            processes (which would wait for one another): a pass that does not fit ends the run.

    Returns:
        The history: for each epoch `after_epoch`'s record with the mean "train_loss" a step and the "seconds" it took.

    Raises:
        UserError: the loss or a weight is no longer a number, out of memory, or a checkpoint cannot be read or written
            or is another run's. The last good checkpoint stays.
    """
    progress: dict[str, Any] = {"epoch": 0, "step": 0, "loss_sum": 0.0, "seconds": 0.0, "history": []}
    if sharding.is_sharded(model):
        sharding.pass_over_unused(model, optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    base_lr = [group["lr"] for group in optimizer.param_groups]
    if there := checkpoints.whole_checkpoints(folder):
        progress = checkpoints.load_newest(accelerator, model, optimizer, there)

    saved = time.monotonic()
    while progress["epoch"] < num_epochs:
        epoch, steps = progress["epoch"], steps_of(progress["epoch"])
        bar = progress_bar(
            total=len(steps), initial=progress["step"], desc=f"{label} epoch {epoch + 1}/{num_epochs}", unit="step",
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        model.train()
        started = time.monotonic()
        seconds_before, examples_seen = progress["seconds"], 0
        for number in range(progress["step"], len(steps)):
            if schedule is not None:
                for group, lr in zip(optimizer.param_groups, base_lr, strict=True):
                    group["lr"] = lr * schedule(epoch, number)
            loss, examples, odd = _step(
                accelerator, model, optimizer, steps[number], loss_of, max_grad_norm, micro_batches
            )
            where = f"epoch {epoch + 1}, step {number + 1} of {len(steps)}"
            if not math.isfinite(loss):
                of_tasks = f" of {', '.join(odd)}" if odd else ""
                raise UserError(
                    f"{label}: the loss{of_tasks} became {loss} at {where}; {_REMEDY.format(folder=folder)}"
                )
            examples_seen += examples
            progress["loss_sum"] += loss
            progress["step"] = number + 1
            now = time.monotonic()
            progress["seconds"] = seconds_before + now - started
            bar.set_postfix(
                {"loss": f"{loss:.3f}", "examples/s": f"{examples_seen / (now - started):.1f}"}, refresh=False
            )
            bar.update()
            # The checkpoint after the last step spares the evaluation that follows from being paid with a whole epoch.
            if (each_epoch and number + 1 == len(steps)) or now - saved > 60 * checkpoint_minutes:
                if not sharding.all_finite(accelerator, model):
                    said = f"{label}: a weight became infinite or no number at {where} or in the steps before it"
                    raise UserError(f"{said}; {_REMEDY.format(folder=folder)}")
                checkpoints.save(accelerator, model, optimizer, folder, progress)
                saved = time.monotonic()
        bar.close()

        evaluated = time.monotonic()
        record = after_epoch(epoch)
        record["train_loss"] = progress["loss_sum"] / len(steps)
        record["seconds"] = progress["seconds"] + time.monotonic() - evaluated
        if all(record["selection"] > earlier["selection"] for earlier in progress["history"]):
            best = sharding.whole(accelerator, model)
            if accelerator.is_main_process:
                with new_folder(folder / f"best-{epoch}") as temporary:
                    best.save_pretrained(temporary)
            del best
        progress = {
            "epoch": epoch + 1, "step": 0, "loss_sum": 0.0, "seconds": 0.0, "history": [*progress["history"], record],
        }  # fmt: skip
        if each_epoch or time.monotonic() - saved > 60 * checkpoint_minutes:
            checkpoints.save(accelerator, model, optimizer, folder, progress)
            saved = time.monotonic()
    return progress["history"]


def _step(
    accelerator, model, optimizer, passes, loss_of, max_grad_norm, micro_batches: MicroBatches | None
) -> tuple[float, int, list[str]]:
    """One optimizer step over `passes`. Returns its loss, the number of examples, and, where the loss is no number, the
    tasks of the passes to blame (those of this process)."""
    whole, gradients = passes, None
    while gradients is None:
        passes = [part for one in whole for part in micro_batches.cut(one)] if micro_batches else whole
        gradients = _gradients(accelerator, model, optimizer, passes, loss_of, micro_batches)
    total, examples, losses = gradients
    if max_grad_norm > 0:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value, odd = accelerator.reduce(total, "mean").item(), set()
    if not math.isfinite(value):
        odd = {getattr(one, "task", "") for one, loss in zip(passes, losses, strict=True) if not loss.isfinite()}
    return value, examples, sorted(odd - {""})


def _gradients(
    accelerator, model, optimizer, passes, loss_of, micro_batches: MicroBatches | None
) -> tuple[torch.Tensor, int, list[torch.Tensor]] | None:
    """Add up the gradients of a step's passes. Returns its loss, the number of examples and each pass's loss; None, with
    no gradients and `micro_batches` set to smaller parts, where a pass did not fit in memory."""
    total, examples, losses = torch.zeros((), device=accelerator.device), 0, []
    for number, one in enumerate(passes):
        try:
            # Gradients cross processes once a step, with the last pass.
            with accelerator.no_sync(model) if number + 1 < len(passes) else contextlib.nullcontext():
                loss, count = loss_of(model, one)
                accelerator.backward(loss)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if micro_batches is None or accelerator.num_processes > 1 or not micro_batches.halve(one):
                raise UserError(
                    "out of memory in training; lower batch_size and raise gradient_accumulation_steps, or give "
                    "--gradient_checkpointing"
                ) from error
            break
        total += loss.detach()
        losses.append(loss.detach())
        examples += count
    else:
        return total, examples, losses
    loss = None  # and with it what its graph holds
    optimizer.zero_grad(set_to_none=True)
    clear_device_cache(garbage_collection=True)
    accelerator.print(
        f"out of memory: passes of {one.task} in parts of {(len(one.rows) + 1) // 2} examples from here on"
    )
    return None
