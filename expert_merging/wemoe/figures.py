"""Figures of merged classifiers: accuracy by method, routing weights, the course of an adaptation."""

from pathlib import Path
from typing import Any

import numpy as np

from expert_merging.report.figures import plt, save_figure  # with the style of all figures


def accuracy(records: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Average accuracy by method: strokes the mean over groups, dots the groups; beside it in mixed batches."""
    methods = list(records)
    figure, axes = plt.subplots(figsize=(1.6 + 0.62 * len(methods), 3.4))
    kinds = (("one-task batches", lambda r: r["average_accuracy"], "C0"),
             ("mixed batches", lambda r: r.get("mixed", {}).get("average_accuracy"), "C1"),
             ("same weights, sample-wise", lambda r: r.get("sample_wise", {}).get("average_accuracy"), "C2"))  # fmt: skip
    for place, method in enumerate(methods):
        values = [[100 * v for r in records[method].values() if (v := get(r)) is not None] for _, get, _ in kinds]
        shown = [i for i, one in enumerate(values) if one]
        for slot, i in enumerate(shown):
            x = place + (slot - (len(shown) - 1) / 2) * 0.27
            axes.plot(x, np.mean(values[i]), "_", ms=11, mew=2.5, color=kinds[i][2])
            axes.plot([x] * len(values[i]), values[i], "o", ms=3, color=kinds[i][2], alpha=0.6)
    for label, get, color in kinds:
        if any(get(r) is not None for groups in records.values() for r in groups.values()):
            axes.plot([], [], "_", ms=11, mew=2.5, color=color, label=label)
    axes.set(ylabel="accuracy, %", xticks=range(len(methods)))
    axes.set_xticklabels(methods, rotation=35, ha="right")
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=7)
    save_figure(figure, path)


def pruning(
    records: dict[str, dict[str, dict[str, Any]]], sweep: dict[str, dict[str, float]], path: Path
) -> None:  # fmt: skip
    """E-WEMoE's average accuracy and bytes against the percent pruned, a line a kind of E-WEMoE as `sweep_of` gives them, dots
    the groups; level lines are WEMoE and task arithmetic, where there are records of them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))

    def accuracies(method: str) -> list[float]:
        return [100 * record["average_accuracy"] for record in records[method].values()]

    for number, (kind, methods) in enumerate(sweep.items()):
        percent, color = list(methods.values()), f"C{number}"
        found = [accuracies(method) for method in methods]
        left.plot(percent, [np.mean(own) for own in found], "-", color=color, label=f"ewemoe{kind}")
        for x, own in zip(percent, found, strict=True):
            left.plot([x] * len(own), own, "o", ms=3, color=color, alpha=0.6)
        held = [next(iter(records[method].values()))["model_info"]["bytes"] / 1e6 for method in methods]
        right.plot(percent, held, "o-", ms=3, color=color)
    for style, method in (("--", "wemoe"), (":", "task_arithmetic")):
        if method in records:
            left.axhline(np.mean(accuracies(method)), ls=style, color="0.4", label=method)
            size = next(iter(records[method].values()))["model_info"]["bytes"] / 1e6
            right.axhline(size, ls=style, color="0.4")
    left.set(xlabel="percent of each task vector dropped", ylabel="average accuracy, %")
    right.set(xlabel="percent of each task vector dropped", ylabel="MB in memory", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=7)
    save_figure(figure, path)


def routing(method: str, groups: dict[str, dict[str, Any]], path: Path) -> None:
    """Mean weight of each task vector: a panel a layer, rows the inputs' task, columns the task vectors; mean over groups."""
    found = [record["routing_weights"] for record in groups.values() if "routing_weights" in record]
    layers, tasks = list(found[0]), list(next(iter(found[0].values())))
    values = np.array([[[one[layer][task] for task in tasks] for layer in layers] for one in found]).mean(axis=0)
    columns = min(len(layers), 6)
    rows = -(-len(layers) // columns)
    size = (1.3 + 1.75 * columns, 0.9 + 1.75 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    most = np.abs(values).max()
    for axes in panels.flat[len(layers) :]:
        axes.set_visible(False)
    for number, (axes, layer) in enumerate(zip(panels.flat, values, strict=False)):
        image = axes.imshow(layer, vmin=min(0, values.min()), vmax=most, cmap="viridis", aspect="auto")
        axes.set(title=f"layer {number + 1}", xticks=range(layer.shape[1]), yticks=range(len(tasks)))
        axes.set_xticklabels(range(1, layer.shape[1] + 1))
        axes.set_yticklabels(tasks if number % columns == 0 else [], fontsize=7)
        axes.grid(False)
        if layer.size <= 36:
            for i, row in enumerate(layer):
                for j, value in enumerate(row):
                    color = "white" if value < 0.6 * most else "black"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    figure.supxlabel("task vector", fontsize=9)
    figure.colorbar(image, ax=panels, label="mean weight", shrink=0.9)
    figure.suptitle(f"{method}: routing weights by the task of the input")
    save_figure(figure, path)


def adaptation(method: str, groups: dict[str, dict[str, Any]], path: Path) -> None:
    """Entropy a task against steps, running mean of 20, and entropy of the mean prediction; mean over groups."""
    records = [record["adaptation"] for record in groups.values() if record.get("adaptation")]
    length = min(record["steps_done"] for record in records)
    width = min(20, length)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6))
    for number, task in enumerate(records[0]["loss"]):
        losses = np.array([record["loss"][task][:length] for record in records]).mean(axis=0)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        left.plot(np.arange(width, width + len(smooth)), smooth, color=f"C{number}", label=task)
        marginal = [record["marginal_entropy"][task] for record in records]
        shortest = min(map(len, marginal))
        if shortest:
            mean = np.array([one[:shortest] for one in marginal]).mean(axis=0)
            right.plot(records[0]["window"] * (1 + np.arange(shortest)), mean, "o-", ms=2.5, color=f"C{number}")
    left.set(xlabel="step", ylabel="entropy, nats", title="of the predictions")
    right.set(xlabel="step", ylabel="share of log C", ylim=(0, 1.03), title="of the mean prediction")
    figure.suptitle(f"{method}: adaptation")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=7)
    save_figure(figure, path)
