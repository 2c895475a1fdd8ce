"""Work on many pieces, done by several processes that fork from this one."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from expert_merging.errors import UserError

_work: Callable[[Any], Any]  # what the forks inherit


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[[Any], Any], pieces: Iterable[Any], processes: int) -> Iterator[Any]:
    """work(piece) of each, in their order. With one process, or where forks are not safe (not Linux), done here.

    Args:
        work: may hold anything, since forks inherit it; it must not compute with torch. Its results are pickled.

    Raises UserError where a process was killed.
    """
    if processes < 2 or sys.platform != "linux":
        yield from map(work, pieces)
        return
    global _work
    _work = work
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin)
    try:
        yield from pool.map(_call, pieces)
    except BrokenProcessPool as error:
        raise UserError("a process was killed, perhaps for want of memory; free some and start again") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def end_with_parent() -> None:
    """On Linux this process ends when the one that started it is killed, so that two never write the same run."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _begin() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken


def _call(piece: Any) -> Any:
    return _work(piece)
