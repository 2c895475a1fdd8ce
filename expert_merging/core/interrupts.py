"""Ctrl-C and SIGTERM end a run as an interrupt, whatever the code that they meet makes of them.

C code that reads a file may lose the KeyboardInterrupt and raise an error of its own, which reads like a damaged file. So
the handler notes that an interrupt came. Code that goes on after an error of a reader calls `check` first, and so does every
step of a bar: Python drops what is raised in a callback or while an object is deleted.
"""

import signal
from collections.abc import Callable
from typing import NoReturn

_came = False


def watch() -> None:
    """From now on note interrupts; also let SIGTERM, which clusters send before they kill, end a run as Ctrl-C does.

    Where Ctrl-C is ignored, as in a job that a shell has put into the background, it stays so.
    """
    global _came
    _came = False
    _handle(_note)


def ignore() -> None:
    """From now on a run that is ending says its last line, however often it is told to end: where one process of several
    has died, the launcher sends SIGTERM to those that already see it."""
    _handle(lambda *_: None)


def came() -> bool:
    """Whether an interrupt has come since `watch`."""
    return _came


def check() -> None:
    """Raises KeyboardInterrupt where an interrupt has come."""
    if _came:
        raise KeyboardInterrupt


def _handle(handler: Callable) -> None:
    signal.signal(signal.SIGTERM, handler)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _note(*_) -> NoReturn:
    global _came
    _came = True
    raise KeyboardInterrupt
