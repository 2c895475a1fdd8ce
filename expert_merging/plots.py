"""The figures: one function each, from histories to a PNG file. Colours follow the task or the configuration everywhere."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from expert_merging.files import replacing  # noqa: E402

plt.rcParams.update({
    "figure.dpi": 130, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
})  # fmt: skip


def pretraining_curve(history: list[dict[str, Any]], path: Path, steps_per_round: int) -> None:
    """Training and held-out loss of the base model against optimizer steps."""
    steps = np.arange(1, len(history) + 1) * steps_per_round
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot(steps, [r["train_loss"] for r in history], label="training (with router losses)", color="0.6")
    axes.plot(steps, [r["heldout_loss"] for r in history], label="held out", color="C0")
    axes.set(xlabel="step", ylabel="cross-entropy, nats a target token", title="Span corruption of docstrings")
    axes.legend()
    _save(figure, path)


def _save(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
