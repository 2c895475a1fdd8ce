"""What a run leaves to read: `{name}.json`, and the same as `{name}.pkl` under the released code's keys.

Only the JSON is ever read back: a pickle from elsewhere can run code.
"""

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import hold, read_json, write_atomic, write_json

# Where things lie and how often they are saved does not change a result.
_WITHOUT_EFFECT = (
    "RUN_DIR",
    "DATA_DIR",
    "PICKLE_PATH",
    "MODEL_SAVE_PATH",
    "SOURCE_MODEL_WEIGHT_PATH",
    "SOURCE_PICKLE_PATH",
)
_WITHOUT_EFFECT += (
    "BASE_MODEL_PATH",
    "AG_NEWS_PATH",
    "SQUAD_PATH",
    "XSUM_PATH",
    "checkpoint_minutes",
    "eval_batch_size",
)
_WITHOUT_EFFECT += ("device", "precision", "gradient_checkpointing", "merge_only", "test_each_epoch")


def save(folder: str | Path, name: str, history: dict[str, Any]) -> None:
    """Write `name`.pkl and `name`.json into `folder`; the JSON last, so that its being there means both are."""
    write_atomic(Path(folder) / f"{name}.pkl", pickle.dumps(history))
    write_json(Path(folder) / f"{name}.json", history)


def load(folder: str | Path, name: str, remedy: str) -> dict[str, Any]:
    """Read a history. Raises UserError where it is absent (`remedy` is the command that makes it) or damaged."""
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        raise UserError(f"{path} does not exist; run: {remedy}")
    return read_json(path)


def read(path: str | Path) -> dict[str, Any]:
    """A history with its place ("file": folder and name) noted in it, for tables that say where a number comes from."""
    path = Path(path)
    return {**read_json(path), "file": f"{path.parent.name}/{path.name}"}


def identity(constants: SimpleNamespace, **more: Any) -> dict[str, Any]:
    """What a run's result depends on, as JSON: the constants but for paths, and what else is given (hashes, say)."""
    values = {name: value for name, value in vars(constants).items() if name not in _WITHOUT_EFFECT} | more
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def changes(was: dict[str, Any], now: dict[str, Any]) -> str:
    """The entries in which two identities differ, in words; empty when they are the same."""
    names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    return ", ".join(f"{name} was {_short(was.get(name))}, is now {_short(now.get(name))}" for name in names)


def finished(folder: str | Path, name: str, wanted: dict[str, Any], work: Path | None = None) -> bool:
    """Whether the run `name` has been done; if not, this process is now the only one that may do it.

    Args:
        work: the folder or file of its checkpoints, removed where a kill came between the result and its removal.

    Raises UserError where it was done with other constants, or another process is at it.
    """
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        hold(path)
    if not path.exists():
        return False
    if difference := changes(read_json(path)["identity"], wanted):
        raise UserError(
            f"{path} was made with other constants or data ({difference}); remove it, or choose another "
            "current_case_name or RUN_DIR"
        )
    if work is not None and work.exists():
        hold(path)
        shutil.rmtree(work, ignore_errors=True) if work.is_dir() else work.unlink(missing_ok=True)
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + " ..."
