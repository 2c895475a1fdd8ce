"""Writing files so that a reader never sees half of one: temporary name, flush, rename."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from expert_merging.errors import UserError


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Make the folder of `path`; what the system refuses becomes one line that names `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        said = f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        raise UserError(said) from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what is written there takes the place of `path` when the block ends well.

    Raises UserError when the disk is full or the folder cannot be written; nothing is left behind then.
    """
    path = Path(path)
    with _writing(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(descriptor)
        temporary = Path(name)
        try:
            os.chmod(temporary, 0o666 & ~_umask())
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, renamed to `path` (replacing it) when the block ends well, else removed.

    Raises UserError as `replacing` does.
    """
    path = Path(path)
    with _writing(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            os.chmod(temporary, 0o777 & ~_umask())
            yield temporary
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                _sync(file)
            if path.exists():
                # A folder cannot replace a full one in one step: the old one steps aside first, and is removed last.
                aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
                os.replace(path, aside)
                os.replace(temporary, path)
                shutil.rmtree(aside)
            else:
                os.replace(temporary, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, content) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path):
    """Read a JSON file. Raises UserError when it is absent or not whole JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} is not readable JSON ({error}); remove it and run the step that writes it again"
        ) from error


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
