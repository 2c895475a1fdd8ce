"""Constants that depend on the scale of an experiment: paper, night or tiny. Imports nothing, so that global_config.py can."""

from dataclasses import dataclass
from typing import Any

SCALES = ("paper", "night", "tiny")


@dataclass(frozen=True)
class ByScale:
    """One value for each scale; made by `by_scale`."""

    paper: Any
    night: Any
    tiny: Any


def by_scale(paper: Any, night: Any, tiny: Any) -> Any:
    """A constant whose value depends on `scale`. Put a plain value in its place to fix it for all scales."""
    return ByScale(paper, night, tiny)
