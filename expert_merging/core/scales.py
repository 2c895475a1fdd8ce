"""Constants that depend on the scale of an experiment: paper, small or tiny. Imports nothing, so that global_config.py can."""

from dataclasses import dataclass
from typing import Any

SCALES = ("paper", "small", "tiny")


@dataclass(frozen=True)
class ByScale:
    """One value for each scale; made by `by_scale`."""

    paper: Any
    small: Any
    tiny: Any


def by_scale(paper: Any, small: Any, tiny: Any) -> Any:
    """A constant whose value depends on `scale`. Put a plain value in its place to fix it for all scales."""
    return ByScale(paper, small, tiny)
