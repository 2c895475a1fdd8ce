"""Constants that depend on the scale of an experiment: paper, night, tiny or real. Imports nothing, so that global_config.py
can."""

from dataclasses import dataclass
from typing import Any

SCALES = ("paper", "night", "tiny", "real")


@dataclass(frozen=True)
class ByScale:
    """One value for each scale; made by `by_scale`."""

    paper: Any
    night: Any
    tiny: Any
    real: Any


def by_scale(paper: Any, night: Any, tiny: Any, real: Any = None) -> Any:
    """A constant whose value depends on `scale`. Put a plain value in its place to fix it for all scales.

    `real` (pre-trained weights of a small published model, real tasks, a night on a laptop) is night's value where none is
    given.
    """
    return ByScale(paper, night, tiny, night if real is None else real)
