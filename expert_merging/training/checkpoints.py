"""Checkpoints of a training run: whole or not there, checked when they are taken up, and only by the run that made them.

A checkpoint holds weights, optimizer, random states and the place in the epoch, and a manifest: every file's hash, what
the run depends on, and the versions. An older one goes when the new one has been read back.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils.other import load as load_weights_only
from safetensors import SafetensorError, safe_open

from expert_merging.core import interrupts
from expert_merging.core.errors import UserError
from expert_merging.core.files import hold, new_folder, read_json, sha256, write_json
from expert_merging.core.hub import first_line
from expert_merging.run import provenance, results, sharding

_MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"  # accelerate's name


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make `folder` the working folder of the run that `identity` (JSON) describes, or take it up again.

    Raises UserError when the folder holds a run with other constants (says which), or another process is at it.
    """
    hold(folder)
    results.refuse_begun(folder, identity)
    if not (folder / results.BEGUN).exists() and int(os.environ.get("RANK", 0)) == 0:  # one process writes
        write_json(folder / results.BEGUN, identity)


def release(folder: Path) -> None:
    """Remove the working folder of a run that is done: its results stand elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)


def best_epoch(history: list[dict[str, Any]]) -> int:
    """The epoch (from 0) with the highest "selection"; the earliest of equals."""
    return max(range(len(history)), key=lambda epoch: (history[epoch]["selection"], -epoch))


def best_folder(folder: Path, history: list[dict[str, Any]]) -> Path:
    """Where `train` left the weights of the best epoch, as a Hugging Face folder."""
    return folder / f"best-{best_epoch(history)}"


def whole_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("checkpoint-*"))


def save(accelerator: Accelerator, model, optimizer, folder: Path, progress: dict[str, Any]) -> None:
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
            for older in [*whole_checkpoints(folder), *folder.glob("best-*")]:
                if older.name not in kept:
                    shutil.rmtree(older)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {path}: {error}; free space (the last one is kept)") from error
    accelerator.wait_for_everyone()


def _manifest(accelerator: Accelerator, model, folder: Path, files: Path) -> dict[str, Any]:
    """What a checkpoint must be, to go on from: its files' hashes, and what it was made with."""
    described = folder / results.BEGUN
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


def load_newest(accelerator: Accelerator, model, optimizer, paths: list[Path]) -> dict[str, Any]:
    """Take up the newest of the checkpoints `paths` that is whole. Raises UserError where none is, or it is not this
    run's."""
    for path in reversed(paths):
        try:
            manifest = _checked(path, _shards(accelerator, model))
            progress = read_json(path / "progress.json")
            if (path / _WEIGHTS).exists():  # of sharded weights there are the shards
                _check_names(accelerator.unwrap_model(model), path / _WEIGHTS)
            accelerator.load_state(str(path), strict=False)  # about names, which have been compared
            if sharding.is_sharded(model):
                sharding.load(accelerator, model, optimizer, path)
        except _Unfit as error:
            raise UserError(str(error)) from error
        except Exception as error:  # a file cut short surfaces as whatever its reader raises
            interrupts.check()
            first = first_line(error)
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


def _check_names(model, weights: Path) -> None:
    """Raises ValueError where the file has other tensors than `model`, but for what accelerate leaves out of it: all but one
    of those that share memory, which tied weights do, and all tensors without an element, by its reckoning."""
    with safe_open(weights, framework="pt") as file:
        there = set(file.keys())
    state = model.state_dict()
    if more := sorted(there - state.keys()):
        raise ValueError(f"{weights.name} has {more[0]}, which the model has not")
    kept = {state[name].data_ptr() for name in there}
    for name, tensor in state.items():
        if name not in there and tensor.numel() and tensor.data_ptr() not in kept:
            raise ValueError(f"{weights.name} lacks {name}")


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
    described = path.parent / results.BEGUN
    wanted = read_json(described) if described.exists() else {}
    if difference := results.changes(manifest["identity"], wanted):
        raise _Unfit(f"{path} is a checkpoint of another run ({difference}); remove it, or restore those constants")
    if (found := manifest.get("shards", 0)) != shards:
        launch = f"with fsdp.yaml and --num_processes {found}" if found else "without fsdp.yaml"
        raise _Unfit(f"{path} was made by a launch {launch}; go on with the same, or remove it")
    return manifest


def _flat_changes(was: dict[str, Any], now: dict[str, Any]) -> str:
    """Versions and processes that differ, in words."""
    return results.changes(
        {**was["versions"], "processes": was["processes"]}, {**now["versions"], "processes": now["processes"]}
    )
