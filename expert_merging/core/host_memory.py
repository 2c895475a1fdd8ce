"""How this process asks the system for memory."""

import contextlib
import ctypes
import gc
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
_LARGEST, _SMALL = 2**30, 2**20


def keep_freed_memory() -> None:
    """Keep what is freed for the next tensor, in place of giving it back, and take it in pages of 2 MB.

    A training step frees its gradients and activations and the next one asks for as much again; glibc returns large blocks
    at once, and the system then clears every page anew, which takes up to a third of a step on a CPU
    (benchmarks/NOTES.md). Only with glibc; without it nothing happens. The pages are torch's to ask for, who reads
    the variable when the first tensor is made: call this before. Whoever has set glibc's MALLOC_MMAP_THRESHOLD_ keeps it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            # Older versions take 32 MB at most.
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST) or libc.mallopt(_MMAP_THRESHOLD, 2**25)
            libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST - 1)


def give_back_freed_memory() -> None:
    """Give back every block of a megabyte and more when it is freed: for work whose peak counts for more than its time.

    Kept blocks lie between others and do not fit the next tensor, which may take half as much again. Only with glibc.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_THRESHOLD, _SMALL)
            libc.mallopt(_TRIM_THRESHOLD, _SMALL)


def begin_anew() -> None:
    """Give back what was freed and kept until now, between pieces of work in one process: blocks that fitted one piece do
    not fit the next, and those of all would add up. Only with glibc."""
    gc.collect()  # what trainers leave refers to itself
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
