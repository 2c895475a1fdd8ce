"""The protocol of a run: what its result depends on, whether it is done, who may do it, and what it leaves to read.

A result is a JSON file that says under "identity" what it depends on. One that was made with another identity is refused
by name: it is neither overwritten nor taken for what was asked. Parts on the way to it, such as the scores of a merged
model, belong to the run that holds the result; one with another identity is made again.

Only the JSON is ever read back: a pickle from elsewhere can run code.
"""

import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import hold, read_json, write_atomic, write_json
from expert_merging.run import devices, provenance
from expert_merging.run.released_keys import from_released

# Where things lie, how often they are saved, and what only the use of memory depends on does not change a result.
_WITHOUT_EFFECT = (
    "RUN_DIR", "DATA_DIR", "PICKLE_PATH", "MODEL_SAVE_PATH", "SOURCE_MODEL_WEIGHT_PATH", "SOURCE_PICKLE_PATH",
    "BASE_MODEL_PATH", "AG_NEWS_PATH", "SQUAD_PATH", "XSUM_PATH", "checkpoint_minutes", "eval_batch_size", "device",
    "gradient_checkpointing", "merge_only", "test_each_epoch",
)  # fmt: skip
BEGUN = "run.json"  # what a run depends on, in the working folder in which it was begun
_KEYS = ("identity", "asked", "constants")  # under which an identity stands; the second and third in older records
_BEFORE = {
    "precision": "fp32",
    "train_sample": 0,
    "shares": "entropy",
    "pool_inputs": 256,
    "calibration": "none",
    "prompts": "plain",
    "router_start": "noise",
    "save_dtype": "float32",
    "scoring_batch": 32,
    "eval_batch_size": 32,
}  # entries that older records lack


# ---------------------------------------------------------------- names


def run_name(case: str, experts: int, target: int | None = None) -> str:
    """A run's name in its files and its record, as in the released code: Baseline_[8], CAEM_[8|16] (from 8 to 16)."""
    return f"{case}_[{experts}]" if target is None else f"{case}_[{experts}|{target}]"


def parse_run_name(name: str) -> tuple[str, int, int | None]:
    """(case, experts, target) of a `run_name`. Raises UserError for any other text."""
    parts = re.fullmatch(r"([^/]+)_\[(\d+)(?:\|(\d+))?\]", name)
    if parts is None:
        raise UserError(f"{name!r} is not the name of a run, which reads like CAEM_[8|8] or Baseline_[8]")
    return parts[1], int(parts[2]), int(parts[3]) if parts[3] else None


def run_label(name: str) -> str:
    """The same run in tables and on the command line of reproduce_tables.py, as in the paper: Baseline-8, CAEM-8-to-16,
    CAEM-8-Avg (the case CAEM-Avg)."""
    case, experts, target = parse_run_name(name)
    method, dash, variant = case.partition("-")
    size = f"{experts}" if target in (None, experts) else f"{experts}-to-{target}"
    return f"{method}-{size}{dash}{variant}"


def pair_name(first: str, second: str) -> str:
    """The name of a comparison of two runs, in its file."""
    return f"{first}__{second}"


# ---------------------------------------------------------------- what a result depends on


def identity(constants: SimpleNamespace, only: Iterable[str] | None = None, **more: Any) -> dict[str, Any]:
    """What a run's result depends on, as JSON: the constants but for paths, and what else is given (hashes, say).

    `precision` is what it comes to on this machine. `only` names the constants that count, where it is not all.
    """
    values = {name: value for name, value in vars(constants).items() if name not in _WITHOUT_EFFECT}
    if only is not None:
        values = {name: getattr(constants, name) for name in only}
    if "precision" in values:
        values["precision"] = devices.precision_of(constants)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in (values | more).items()}


def made_with(record: dict[str, Any]) -> dict[str, Any]:
    """The identity that a record notes, also one of an older version, in which precision stood beside it."""
    noted: dict[str, Any] = next((record[key] for key in _KEYS if key in record), {})
    return {"precision": "bf16"} | noted if record.get("precision") == "bf16" else noted


def changes(was: dict[str, Any], now: dict[str, Any]) -> str:
    """The entries in which two identities differ, in words; empty when they are the same."""
    was, now = _BEFORE | was, _BEFORE | now
    said = []
    for name in sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name)):
        before, after = was.get(name), now.get(name)
        pairs = {name: (before, after)}
        if isinstance(before, dict) and isinstance(after, dict):  # say which of its entries, as "recipe.lr"
            inner = sorted(key for key in before.keys() | after.keys() if before.get(key, ...) != after.get(key, ...))
            pairs = {f"{name}.{key}": (before.get(key), after.get(key)) for key in inner}
        said += [f"{place} was {_short(old)}, is now {_short(new)}" for place, (old, new) in pairs.items()]
    return ", ".join(said)


def refuse(place: str | Path, was: dict[str, Any], now: dict[str, Any], remedy: str) -> None:
    """Raises UserError, naming `place`, the changes and the `remedy`, where what lies there has another identity."""
    if difference := changes(was, now):
        raise UserError(f"{place} was made with other constants ({difference}); {remedy}")


def shared(was: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of two identities what both note, where one of them knows more."""
    both = was.keys() & now.keys()
    return {name: was[name] for name in both}, {name: now[name] for name in both}


def refuse_others(paths: Iterable[Path], wanted: dict[str, Any], elsewhere: str, but: tuple[str, ...] = ()) -> None:
    """Raises UserError where one of the records `paths`, beside which a new one would stand in a table, was made with
    another identity, the entries `but` aside ("recipe.lr" is the entry lr of the entry recipe). `elsewhere` names the constant
    that says where the records lie."""
    for path in paths:
        was, now = (without(one, but) for one in (made_with(read_json(path)), wanted))
        refuse(path, was, now, f"one table would show both: restore them, or choose another {elsewhere}")


def without(identity: dict[str, Any], but: Iterable[str]) -> dict[str, Any]:
    """An identity less the entries `but`."""
    kept = dict(identity)
    for name, _, inner in (one.partition(".") for one in but):
        if not inner:
            kept.pop(name, None)
        elif isinstance(kept.get(name), dict):
            kept[name] = without(kept[name], (inner,))
    return kept


# ---------------------------------------------------------------- whether it is done


def is_done(
    path: str | Path, wanted: dict[str, Any], work: Path | None = None, *, claim: Path | None = None,
    elsewhere: str = "current_case_name or RUN_DIR", again: str = "",
) -> bool:  # fmt: skip
    """Whether the result `path` is there; if not, this process is now the only one that may make it.

    Args:
        wanted: its identity.
        work: the folder or file of its checkpoints, removed where a kill came between the result and its removal.
        claim: what is written as a whole, where that is not `path` but the folder it lies in.
        elsewhere: the constants that would put another result beside it.
        again: a verb; where the result is there, say so, and that its removal lets one do that again.

    Raises UserError where it was made, or begun in `work`, with another identity, or another process is at it.
    """
    path = Path(path)
    if not path.exists():
        hold(claim or path)
    if not path.exists():
        if work is not None:
            refuse_begun(work, wanted)
        return False
    refuse(path, made_with(read_json(path)), wanted, f"restore them, remove it, or choose another {elsewhere}")
    if work is not None and work.exists():
        hold(claim or path)
        shutil.rmtree(work, ignore_errors=True) if work.is_dir() else work.unlink(missing_ok=True)
    if again and int(os.environ.get("RANK", 0)) == 0:
        print(f"{path} is there already; remove it to {again} again")
    return True


def refuse_begun(work: Path, wanted: dict[str, Any]) -> None:
    """Raises UserError where the working folder `work` holds a run that was begun with another identity."""
    if (described := work / BEGUN).exists():
        refuse(work, read_json(described), wanted, "it holds a run that was begun: restore them or remove it")


def part(path: str | Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What `save` wrote on the way to a result, without the notes of its making; None where it is not there or was made
    with another identity, and is to be made again."""
    record = from_released(read_json(path)) if Path(path).exists() else None
    if record is None or changes(made_with(record), wanted):
        return None
    return {name: value for name, value in record.items() if name not in (*_KEYS, "command", "versions")}


# ---------------------------------------------------------------- on disk


def save(
    path: str | Path, identity: dict[str, Any], record: dict[str, Any], released: dict[str, Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Write a result with its identity, the command and the versions, and return all of it; an entry of `record` wins.

    `released`: what goes into the .pkl of the same name, for users of the released code. The JSON comes last: its being
    there means that both are.
    """
    path = Path(path)
    content = {"command": provenance.command(), "versions": provenance.versions(), "identity": identity, **record}
    if released is not None:
        write_atomic(path.with_name(f"{path.stem}.pkl"), pickle.dumps(released))
    write_json(path, content)
    return content


def load(path: str | Path, remedy: str | Callable[[], str]) -> dict[str, Any]:
    """Read a result. Raises UserError where it is absent (`remedy` is, or gives, the command that makes it) or damaged."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist; run: {remedy if isinstance(remedy, str) else remedy()}")
    return from_released(read_json(path))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + " ..."
