"""Writing files so that a reader never sees half of one, and a power cut leaves the old or the new; who may write them.

A temporary name beside the target, flush to disk, rename, flush of the folder. What a killed writer left under its
temporary name is removed by the next one. `hold` keeps a second run from writing what this one writes.
"""

import atexit
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from expert_merging.core.errors import UserError

_UNFINISHED = ".unfinished"
_held: dict[Path, int] = {}  # lock file -> descriptor, for the life of the process


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Make the folder of `path`; what the system refuses becomes one line that names `path`."""
    try:
        _make_folder(path.parent)
        yield
    except OSError as error:
        raise _cannot_write(path, error.strerror or str(error)) from error
    except SafetensorError as error:
        raise _cannot_write(path, str(error)) from error
    except RuntimeError as error:  # of torch.save
        if not any(words in str(error) for words in ("PytorchStreamWriter", "iostream error", "inline_container")):
            raise
        raise _cannot_write(path, str(error)) from error


def _cannot_write(path: Path, reason: str) -> UserError:
    reason = next(iter(reason.strip().splitlines()), "unknown reason").rstrip(".")
    return UserError(
        f"cannot write {path}: {reason}; free space or choose another folder (what stood there still does)"
    )


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what is written there takes the place of `path` when the block ends well.

    Raises UserError when the disk is full or the folder cannot be written; nothing is left behind then.
    """
    path = Path(path)
    with _writing(path), _temporary(path, folder=False) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, renamed to `path` (replacing it) when the block ends well, else removed.

    Raises UserError as `replacing` does.
    """
    path = Path(path)
    with _writing(path), _temporary(path, folder=True) as temporary:
        yield temporary
        for written in [*sorted(temporary.rglob("*")), temporary]:
            _sync(written)
        if not path.exists():
            os.replace(temporary, path)
        elif not _exchange(temporary, path):
            # Without an exchange in one step the old folder steps aside first.
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED))
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside)
        _sync(path.parent)


@contextlib.contextmanager
def _temporary(path: Path, folder: bool) -> Iterator[Path]:
    """A new file or folder for what `path` will be, locked while it is written and gone when the block ends."""
    sweep(path.parent)
    start = f".{path.name}."
    while True:
        if folder:
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=start, suffix=_UNFINISHED))
            os.chmod(temporary, 0o777 & ~_umask())
        else:
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=start, suffix=_UNFINISHED)
            os.close(descriptor)
            temporary = Path(name)
            os.chmod(temporary, 0o666 & ~_umask())
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process took it for a dead one's, before it was locked
        _lock(descriptor)
        if temporary.exists():
            break
        os.close(descriptor)
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(descriptor)


def sweep(folder: str | Path) -> None:
    """Remove from `folder` what writers that are no more left half-written."""
    for left in Path(folder).glob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                if _lock(descriptor):
                    _remove(left)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether this process now has the lock, which ends with it; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders swap names in one step, so that neither name is ever free. False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def hold(path: str | Path, patience: float = 3.0) -> None:
    """Make this process the only one that writes the result `path`, until it ends, however it ends.

    Of several processes of one run the first holds it for all. Where the file system has no locks, a warning says so.

    Raises UserError when another run holds it, still after `patience` seconds.
    """
    path = Path(path).absolute()
    place = path.with_name(f".{path.name}.lock")
    if place in _held or int(os.environ.get("RANK", 0)) != 0:
        return
    began = time.monotonic()
    while True:
        with _writing(place):
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        locked = _lock(descriptor)
        if locked is None:
            warnings.warn(f"{place} cannot be locked on this file system: start no second run there", stacklevel=2)
        elif not locked:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            if time.monotonic() - began > patience:
                raise UserError(
                    f"{path} is being written by another run ({holder}); wait for it, or choose another RUN_DIR"
                )
            time.sleep(0.1)
            continue
        elif not place.exists() or os.fstat(descriptor).st_ino != place.stat().st_ino:
            os.close(descriptor)  # its last holder has just removed it
            continue
        break
    with contextlib.suppress(OSError):  # a full disk; the lock holds nevertheless
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held[place] = descriptor
    sweep(path.parent)


@atexit.register
def _let_go() -> None:
    """Remove the lock files; after a kill they stay, and bind nobody."""
    for place, descriptor in _held.items():
        place.unlink(missing_ok=True)
        os.close(descriptor)
    _held.clear()


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


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> None:
    """Write a line of JSON a row, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: str | Path):
    """Read a JSON file. Raises UserError when it is absent or not whole JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{path} is not readable JSON ({error}); remove it and run the step that writes it again"
        ) from error


def is_there(out: Path, same: Callable[[], bool]) -> bool:
    """Whether the folder `out` is there, and made as it would be made now; if not, this process is now the only one that may
    make it. Raises UserError where it is something else, or another process is at it."""
    if not out.exists():
        hold(out)
    if not out.exists():
        return False
    if not same():
        raise UserError(
            f"{out} is there already, and not what this command makes; choose another folder, or remove it first"
        )
    print(f"{out}: there already")
    return True


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
