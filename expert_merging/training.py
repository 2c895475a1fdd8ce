"""The training loop: epochs of steps of passes, with checkpoints. It knows neither model nor task.

What one pass computes (`loss_of`), which passes make a step (`steps_of`) and what follows an epoch (`after_epoch`) are
handed in. Killed at any moment, the same call goes on from the last checkpoint and ends with the same weights, bit for
bit on CPU: a checkpoint holds weights, optimizer, random states and the place in the epoch.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm.auto import tqdm

from expert_merging import histories
from expert_merging.errors import UserError
from expert_merging.files import new_folder, read_json, write_json


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
    label: str = "",
) -> list[dict[str, Any]]:
    """Train `model` in place; the weights of the best epoch end up in `best_folder(folder, history)`.

    Args:
        steps_of: epoch -> its steps; a step is a list of passes, whatever `loss_of` understands.
        loss_of: (model, pass) -> (share of the step's loss, examples). The shares of a step's passes add up to its loss.
        after_epoch: epoch -> what to note in the history; its "selection" (higher is better) chooses the best epoch.
        schedule: (epoch, step) -> factor on the optimizer's learning rate; None keeps it constant.

    Returns:
        The history: for each epoch `after_epoch`'s record with the mean "train_loss" a step and the "seconds" it took.

    Raises:
        UserError: the loss is no longer a number, or a checkpoint cannot be read or written.
    """
    progress = {"epoch": 0, "step": 0, "loss_sum": 0.0, "seconds": 0.0, "history": []}
    model, optimizer = accelerator.prepare(model, optimizer)
    base_lr = [group["lr"] for group in optimizer.param_groups]
    if last := _checkpoints(folder):
        progress = _load_checkpoint(accelerator, last[-1])

    while progress["epoch"] < num_epochs:
        epoch, steps = progress["epoch"], steps_of(progress["epoch"])
        bar = tqdm(
            total=len(steps), initial=progress["step"], desc=f"{label} epoch {epoch + 1}/{num_epochs}", unit="step",
            disable=not accelerator.is_main_process, dynamic_ncols=True, mininterval=1.0,
        )  # fmt: skip
        model.train()
        started = saved = time.monotonic()
        seconds_before, examples_seen = progress["seconds"], 0
        for number in range(progress["step"], len(steps)):
            if schedule is not None:
                for group, lr in zip(optimizer.param_groups, base_lr, strict=True):
                    group["lr"] = lr * schedule(epoch, number)
            loss, examples = _step(accelerator, model, optimizer, steps[number], loss_of, max_grad_norm)
            if not math.isfinite(loss):
                raise UserError(
                    f"{label}: the loss became {loss} at epoch {epoch + 1}, step {number + 1} of {len(steps)}; "
                    f"lower lr (the last good checkpoint stays in {folder})"
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
            if number + 1 == len(steps) or now - saved > 60 * checkpoint_minutes:
                _save_checkpoint(accelerator, folder, progress)
                saved = time.monotonic()
        bar.close()

        evaluated = time.monotonic()
        record = after_epoch(epoch)
        record["train_loss"] = progress["loss_sum"] / len(steps)
        record["seconds"] = progress["seconds"] + time.monotonic() - evaluated
        if all(record["selection"] > earlier["selection"] for earlier in progress["history"]):
            if accelerator.is_main_process:
                with new_folder(folder / f"best-{epoch}") as temporary:
                    accelerator.unwrap_model(model).save_pretrained(temporary)
        progress = {
            "epoch": epoch + 1, "step": 0, "loss_sum": 0.0, "seconds": 0.0, "history": [*progress["history"], record],
        }  # fmt: skip
        _save_checkpoint(accelerator, folder, progress)
    return progress["history"]


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make `folder` the working folder of the run that `identity` (JSON) describes, or take it up again.

    Raises UserError when the folder holds a run with other constants; says which.
    """
    described = folder / "run.json"
    if not described.exists():
        write_json(described, identity)
        return
    if difference := histories.changes(read_json(described), identity):
        raise UserError(
            f"{folder} holds a run begun with other constants or data ({difference}); restore them or remove the folder"
        )


def release(folder: Path) -> None:
    """Remove the working folder of a run that is done: its results stand elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)


def best_epoch(history: list[dict[str, Any]]) -> int:
    """The epoch (from 0) with the highest "selection"; the earliest of equals."""
    return max(range(len(history)), key=lambda epoch: (history[epoch]["selection"], -epoch))


def _step(accelerator, model, optimizer, passes, loss_of, max_grad_norm) -> tuple[float, int]:
    """One optimizer step over `passes`. Returns its loss and the number of examples."""
    total, examples = torch.zeros((), device=accelerator.device), 0
    for number, one in enumerate(passes):
        # Gradients cross processes once a step, with the last pass.
        with accelerator.no_sync(model) if number + 1 < len(passes) else contextlib.nullcontext():
            loss, count = loss_of(model, one)
            accelerator.backward(loss)
        total += loss.detach()
        examples += count
    if max_grad_norm > 0:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return accelerator.reduce(total, "mean").item(), examples


def best_folder(folder: Path, history: list[dict[str, Any]]) -> Path:
    """Where `train` left the weights of the best epoch, as a Hugging Face folder."""
    return folder / f"best-{best_epoch(history)}"


def _checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("checkpoint-*"))


def _save_checkpoint(accelerator: Accelerator, folder: Path, progress: dict[str, Any]) -> None:
    """Write a checkpoint under a name of its own, whole, and only then remove the older ones. Every process takes part."""
    path = folder / f"checkpoint-{progress['epoch']:04d}-{progress['step']:08d}"
    temporary = folder / ".checkpoint.tmp"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(temporary / "progress.json", progress)
            with new_folder(path) as final:
                for file in temporary.iterdir():
                    os.replace(file, final / file.name)
            temporary.rmdir()
            kept = {path.name, f"best-{best_epoch(progress['history'])}" if progress["history"] else ""}
            for older in [*_checkpoints(folder), *folder.glob("best-*")]:
                if older.name not in kept:
                    shutil.rmtree(older)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {path}: {error}; free space (the last one is kept)") from error
    accelerator.wait_for_everyone()


def _load_checkpoint(accelerator: Accelerator, path: Path) -> dict[str, Any]:
    try:
        progress = read_json(path / "progress.json")
        accelerator.load_state(str(path))
    except Exception as error:  # a file cut short surfaces as whatever its reader raises
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({first}); remove {path.parent} to begin this run again") from error
    return progress
