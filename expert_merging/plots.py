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


def training_curves(histories: dict[str, dict[str, Any]], goals: dict[str, float], path: Path) -> None:
    """Validation scores over epochs: a panel a task and one for Overall, a line a configuration.

    Args:
        histories: configuration -> history, all of the same tasks.
        goals: task -> the single-task model's validation score, drawn as a dotted line.
    """
    tasks = next(iter(histories.values()))["tasks"]
    figure, panels = plt.subplots(1, len(tasks) + 1, figsize=(3 * (len(tasks) + 1), 3))
    for number, (label, history) in enumerate(histories.items()):
        epochs = np.arange(1, len(history["selection"]) + 1)
        style = {"marker": "o", "ms": 3, "color": f"C{number}", "label": label}
        for axes, task in zip(panels, tasks, strict=False):
            data = history[f"{task}_data"]
            axes.plot(epochs, [scores[data["main_score"]] for scores in data["validation"]], **style)
        panels[-1].plot(epochs, history["selection"], **style)
        panels[-1].axvline(history["best_epoch"], color=f"C{number}", lw=0.8, ls=":")
    for axes, task in zip(panels, tasks, strict=False):
        axes.axhline(goals[task], color="0.3", lw=0.8, ls=":", label="single-task model")
        axes.set(title=task, ylabel=next(iter(histories.values()))[f"{task}_data"]["main_score"])
    panels[-1].axhline(1.0, color="0.3", lw=0.8, ls=":")
    panels[-1].set(title="Overall (dotted: best epoch)", ylabel="mean of score / single-task score")
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].legend()
    _save(figure, path)


def expert_use(history: dict[str, Any], path: Path) -> None:
    """Heat maps of expert use, as in the paper's figure 3: a panel a task and stack; sparse layer x expert, share of tokens."""
    tasks = list(history["expert_usage_grid"])
    stacks = {
        "encoder": (history["expert_usage_grid"], history["entropy"]),
        "decoder": (history["expert_usage_grid_de"], history["entropy_de"]),
    }
    shares = {
        (stack, task): np.array(grids[task]) / np.maximum(np.sum(grids[task], axis=1, keepdims=True), 1)
        for stack, (grids, _) in stacks.items()
        for task in tasks
    }
    most = max(share.max() for share in shares.values())  # one scale for all panels, so that they compare
    figure, panels = plt.subplots(2, len(tasks), figsize=(3.2 * len(tasks), 4), squeeze=False)
    for axes, ((stack, task), share) in zip(panels.flat, shares.items(), strict=True):
        image = axes.imshow(share, vmin=0, vmax=most, cmap="viridis", aspect="auto")
        axes.set(
            title=f"{stack}, {task}\nentropy {np.mean(stacks[stack][1][task]):.3f}",
            xlabel="expert",
            ylabel="sparse layer",
            xticks=range(share.shape[1]),
            yticks=range(share.shape[0]),
            xticklabels=range(1, share.shape[1] + 1),
            yticklabels=range(1, share.shape[0] + 1),
        )
        axes.grid(False)
    figure.colorbar(image, ax=panels, label="share of tokens", shrink=0.8)
    figure.suptitle(history["name"])
    _save(figure, path)


def allocation(history: dict[str, Any], path: Path) -> None:
    """How many of each layer's experts came from which task: stacked bars, encoder and decoder."""
    tasks = history["tasks"]
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
    for axes, stack, key in zip(panels, ("encoder", "decoder"), ("en", "de"), strict=True):
        counts = np.array(history[f"record_stay_num_experts_{key}"])
        layers = np.arange(1, len(counts) + 1)
        for number, task in enumerate(tasks):
            axes.bar(layers, counts[:, number], bottom=counts[:, :number].sum(axis=1), label=task, color=f"C{number}")
        axes.set(title=stack, xlabel="sparse layer", xticks=layers)
    panels[0].set_ylabel("experts")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(tasks))
    figure.suptitle(f"{history['name']}: experts from each task")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
