"""Progress bars: one line that moves in a terminal; in a log a line every half minute, and none for what is quicker."""

import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from expert_merging.core import interrupts

SECONDS_IN_A_LOG = 30


def bar(iterable: Iterable | None = None, desc: str | None = None, **settings: Any):
    """A `tqdm` over `iterable`, or one that is moved by hand, with tqdm's own `settings`.

    Where standard error is no terminal it prints whole lines, at most one every SECONDS_IN_A_LOG seconds. Each step raises
    KeyboardInterrupt where one came before and was lost, as in a callback from C.
    """
    tqdm = _checked()
    if sys.stderr.isatty():
        return tqdm(iterable, desc, **{"dynamic_ncols": True, "mininterval": 1.0, **settings})
    in_a_log = {"mininterval": SECONDS_IN_A_LOG, "delay": SECONDS_IN_A_LOG, "ncols": 120, "file": _Lines(sys.stderr)}
    return tqdm(iterable, desc, **{**settings, **in_a_log})


@functools.cache  # tqdm starts a thread a class
def _checked() -> type:
    """tqdm's class, with a look for lost interrupts."""
    from tqdm.auto import tqdm

    class Checked(tqdm):
        def __iter__(self) -> Iterator:
            for item in super().__iter__():
                interrupts.check()
                yield item

        def update(self, n: float | None = 1) -> bool | None:
            interrupts.check()
            return super().update(n)

    return Checked


class _Lines:
    """A stream on which a bar's redrawing becomes a line of its own."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.replace("\r", "").strip():
            self._stream.write(line + "\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
