"""The training loop: epochs of steps of passes, with checkpoints. It knows neither model nor task.

What one pass computes (`loss_of`), which passes make a step (`steps_of`) and what follows an epoch (`after_epoch`) are
handed in. Killed at any moment, the same call goes on from the last checkpoint and ends with the same weights, bit for
bit on CPU: a checkpoint holds weights, optimizer, random states and the place in the epoch, and a manifest: every
file's hash, what the run depends on, and the versions. An older one goes when the new one has been read back.
"""

import contextlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from accelerate.utils.other import load as load_weights_only
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from expert_merging import histories, provenance, sharding
from expert_merging.batching import MicroBatches
from expert_merging.errors import UserError
from expert_merging.files import hold, new_folder, read_json, sha256, write_json

_DESCRIBED = "run.json"  # what the run depends on, in its working folder
_MANIFEST = "manifest.json"
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
) -> list[dict[str, Any]]:
    """Train `model` in place; the weights of the best epoch end up in `best_folder(folder, history)`.

    Args:
        steps_of: epoch -> its steps; a step is a list of passes, whatever `loss_of` understands.
        loss_of: (model, pass) -> (share of the step's loss, examples). The shares of a step's passes add up to its loss.
            Where a pass has a `task`, a loss that is no number names it.
        after_epoch: epoch -> what to note in the history; its "selection" (higher is better) chooses the best epoch.
        schedule: (epoch, step) -> factor on the optimizer's learning rate; None keeps it constant.
        micro_batches: cuts passes that do not fit in memory; a step's loss and examples stay the same. None, or several
            processes (which would wait for one another): a pass that does not fit ends the run.

    Returns:
        The history: for each epoch `after_epoch`'s record with the mean "train_loss" a step and the "seconds" it took.

    Raises:
        UserError: the loss or a weight is no longer a number, out of memory, or a checkpoint cannot be read or written
            or is another run's. The last good checkpoint stays.
    """
    progress = {"epoch": 0, "step": 0, "loss_sum": 0.0, "seconds": 0.0, "history": []}
    if sharding.is_sharded(model):
        sharding.pass_over_unused(model, optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    base_lr = [group["lr"] for group in optimizer.param_groups]
    if there := _checkpoints(folder):
        progress = _load_newest(accelerator, model, optimizer, there)

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
            if number + 1 == len(steps) or now - saved > 60 * checkpoint_minutes:
                if not sharding.all_finite(accelerator, model):
                    said = f"{label}: a weight became infinite or no number at {where} or in the steps before it"
                    raise UserError(f"{said}; {_REMEDY.format(folder=folder)}")
                _save_checkpoint(accelerator, model, optimizer, folder, progress)
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
        _save_checkpoint(accelerator, model, optimizer, folder, progress)
    return progress["history"]


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make `folder` the working folder of the run that `identity` (JSON) describes, or take it up again.

    Raises UserError when the folder holds a run with other constants (says which), or another process is at it.
    """
    hold(folder)
    described = folder / _DESCRIBED
    if not described.exists():
        if int(os.environ.get("RANK", 0)) == 0:  # one process writes
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


def best_folder(folder: Path, history: list[dict[str, Any]]) -> Path:
    """Where `train` left the weights of the best epoch, as a Hugging Face folder."""
    return folder / f"best-{best_epoch(history)}"


def _checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("checkpoint-*"))


def _save_checkpoint(accelerator: Accelerator, model, optimizer, folder: Path, progress: dict[str, Any]) -> None:
    """Write a checkpoint under a name of its own, whole, read it back, and only then remove the older ones.

    Every process takes part.
    """
    path = folder / f"checkpoint-{progress['epoch']:04d}-{progress['step']:08d}"
    temporary = folder / ".checkpoint.tmp"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))  # of sharded weights only the random states
        if sharding.is_sharded(model):
            sharding.save(accelerator, model, optimizer, temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with new_folder(path) as final:
                (temporary / "progress.json").write_text(json.dumps(progress))
                (temporary / _MANIFEST).write_text(
                    json.dumps(_manifest(accelerator, model, folder, temporary), indent=1)
                )
                for file in temporary.iterdir():
                    os.replace(file, final / file.name)
            temporary.rmdir()
            _read_back(path)
            kept = {path.name, f"best-{best_epoch(progress['history'])}" if progress["history"] else ""}
            for older in [*_checkpoints(folder), *folder.glob("best-*")]:
                if older.name not in kept:
                    shutil.rmtree(older)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {path}: {error}; free space (the last one is kept)") from error
    accelerator.wait_for_everyone()


def _manifest(accelerator: Accelerator, model, folder: Path, files: Path) -> dict[str, Any]:
    """What a checkpoint must be, to go on from: its files' hashes, and what it was made with."""
    described = folder / _DESCRIBED
    return {
        "sha256": {str(file.relative_to(files)): sha256(file) for file in sorted(files.rglob("*")) if file.is_file()},
        "identity": read_json(described) if described.exists() else {},
        "versions": provenance.versions(),
        "processes": accelerator.num_processes,
        "shards": _shards(accelerator, model),
    }


def _shards(accelerator: Accelerator, model) -> int:
    """Processes over which the weights are shared out; 0 where each has them whole."""
    return accelerator.num_processes if sharding.is_sharded(model) else 0


def _read_back(path: Path) -> None:
    """Open every file of a new checkpoint. Raises what the readers raise where one is not whole."""
    for name in read_json(path / _MANIFEST)["sha256"]:
        file = path / name
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                list(tensors.keys())
        elif file.suffix in (".bin", ".pkl"):
            load_weights_only(file, map_location="cpu", mmap=True)


def _load_newest(accelerator: Accelerator, model, optimizer, paths: list[Path]) -> dict[str, Any]:
    """Take up the newest of the checkpoints `paths` that is whole. Raises UserError where none is, or it is not this
    run's."""
    for path in reversed(paths):
        try:
            manifest = _checked(path, _shards(accelerator, model))
            progress = read_json(path / "progress.json")
            accelerator.load_state(str(path))
            if sharding.is_sharded(model):
                sharding.load(accelerator, model, optimizer, path)
        except _Unfit as error:
            raise UserError(str(error)) from error
        except Exception as error:  # a file cut short surfaces as whatever its reader raises
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            if path == paths[0]:
                raise UserError(f"{path} is damaged ({first}); remove {path.parent} to begin this run again") from error
            warnings.warn(f"{path} is damaged ({first}); going on from the one before", stacklevel=2)
            continue
        if manifest["processes"] != accelerator.num_processes or manifest["versions"] != provenance.versions():
            now = {"versions": provenance.versions(), "processes": accelerator.num_processes}
            difference = _flat_changes(manifest, now)
            warnings.warn(f"{path} was made with {difference}: the result may differ in its last digits", stacklevel=2)
        return progress
    raise AssertionError("no checkpoint to load")


class _Unfit(Exception):
    """A checkpoint that is whole, but not of this run."""


def _checked(path: Path, shards: int) -> dict[str, Any]:
    """The manifest of the checkpoint `path`, whose files have been compared with it, for a run of so many shards."""
    if not (path / _MANIFEST).exists():
        raise ValueError(f"it has no {_MANIFEST}")
    manifest = read_json(path / _MANIFEST)
    for name, digest in manifest["sha256"].items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if sha256(path / name) != digest:
            raise ValueError(f"{name} has changed")
    _read_back(path)  # accelerate passes over random states that it cannot read
    described = path.parent / _DESCRIBED
    wanted = read_json(described) if described.exists() else {}
    if difference := histories.changes(manifest["identity"], wanted):
        raise _Unfit(f"{path} is a checkpoint of another run ({difference}); remove it, or restore those constants")
    if (found := manifest.get("shards", 0)) != shards:
        launch = f"with fsdp.yaml and --num_processes {found}" if found else "without fsdp.yaml"
        raise _Unfit(f"{path} was made by a launch {launch}; go on with the same, or remove it")
    return manifest


def _flat_changes(was: dict[str, Any], now: dict[str, Any]) -> str:
    """Versions and processes that differ, in words."""
    return histories.changes(
        {**was["versions"], "processes": was["processes"]}, {**now["versions"], "processes": now["processes"]}
    )
