"""The figures: one function each, from records to a PNG or, by the path's ending, SVG file. Colours follow the task or
the configuration everywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from expert_merging.core.files import replacing  # noqa: E402

plt.rcParams.update({
    "figure.dpi": 130, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
    "svg.hashsalt": "caem", "svg.fonttype": "path",  # the same bytes each time
})  # fmt: skip


def pretraining_curve(history: list[dict[str, Any]], path: Path, tokens_per_round: int) -> None:
    """Losses of the base model against the tokens seen, and below how evenly its experts were used."""
    tokens = np.arange(1, len(history) + 1) * tokens_per_round / 1e6
    figure, (above, below) = plt.subplots(2, figsize=(5.5, 5), sharex=True, height_ratios=(3, 2))
    above.plot(tokens, [r["train_loss"] for r in history], label="training (with router losses)", color="0.6")
    above.plot(tokens, [r["heldout_loss"] for r in history], label="held-out docstrings", color="C0")
    above.set(ylabel="nats a target token", title="Span corruption")
    above.legend()
    for stack, style in zip(("encoder", "decoder"), ("-", "--"), strict=True):
        for layer in range(len(history[0]["entropy"][stack])):
            entropies = [r["entropy"][stack][layer] for r in history]
            below.plot(tokens, entropies, style, color=f"C{layer}", label=f"{stack}, sparse layer {layer + 1}")
    below.set(xlabel="million tokens seen", ylabel="usage entropy", ylim=(0, 1.02))
    below.legend(fontsize="small", ncols=2)
    save_figure(figure, path)


def response(panels: dict[str, dict[int, list[tuple[float, float]]]], path: Path) -> None:
    """Test score against the experts that the task got; panels "{task}, {when}", two rows of as many as there are tasks."""
    figure, axes = plt.subplots(2, len(panels) // 2, figsize=(3.2 * len(panels) / 2, 5), squeeze=False)
    for panel, (title, of_seeds) in zip(axes.flat, panels.items(), strict=True):
        for number, (seed, pairs) in enumerate(of_seeds.items()):
            experts, scores = np.array(pairs).T
            panel.plot(experts, scores, "o", color=f"C{number}", markersize=4, label=f"seed {seed}")
            if np.ptp(experts) > 0:
                ends = np.array([experts.min(), experts.max()])
                panel.plot(ends, np.polyval(np.polyfit(experts, scores, 1), ends), color=f"C{number}", linewidth=1)
        panel.set(title=title, xlabel="experts a layer", ylabel="test score")
    axes[0, 0].legend(fontsize="small")
    save_figure(figure, path)


def expert_use(history: dict[str, Any], path: Path) -> None:
    """Heat maps of expert use, as in the paper's figure 3: a panel a task and stack; sparse layer x expert, share of tokens."""
    usage, entropy = history["usage"], history["entropy"]
    tasks = list(next(iter(usage.values())))
    shares = {
        (stack, task): np.array(grids[task]) / np.maximum(np.sum(grids[task], axis=1, keepdims=True), 1)
        for stack, grids in usage.items()
        for task in tasks
    }
    most = max(share.max() for share in shares.values())  # one scale for all panels, so that they compare
    size = (3.2 * len(tasks), 2 * len(usage))
    figure, panels = plt.subplots(len(usage), len(tasks), figsize=size, squeeze=False)
    for axes, ((stack, task), share) in zip(panels.flat, shares.items(), strict=True):
        image = axes.imshow(share, vmin=0, vmax=most, cmap="viridis", aspect="auto")
        axes.set(
            title=f"{stack}, {task}\nentropy {np.mean(entropy[stack][task]):.3f}",
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
    save_figure(figure, path)


def shares_of_experts(name: str, counts: list[list[int]], entropies: Sequence[float], path: Path) -> None:
    """Heat map of one stack's expert use: sparse layer x expert, the share of all choices, each layer's entropy beside it.

    Args:
        counts: times each expert was chosen, [layers][n]; entropies: [layers].
    """
    share = np.array(counts) / np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
    layers, experts = share.shape
    figure, axes = plt.subplots(figsize=(min(3 + 0.15 * experts, 14), 1.5 + 0.18 * layers))
    image = axes.imshow(share, vmin=0, cmap="viridis", aspect="auto")
    step = -(-experts // 16)
    axes.set(title=name, xlabel="expert", ylabel="sparse layer: entropy", xticks=range(0, experts, step))
    axes.set(xticklabels=range(1, experts + 1, step), yticks=range(layers))
    axes.set_yticklabels([f"{layer}: {entropy:.2f}" for layer, entropy in enumerate(entropies, 1)], fontsize="x-small")
    axes.grid(False)
    figure.colorbar(image, label="share of choices")
    save_figure(figure, path)


def allocation(history: dict[str, Any], path: Path) -> None:
    """How many of each layer's experts came from which task: stacked bars, a panel a stack."""
    tasks, stacks = history["tasks"], len(history["allocation"])
    figure, (panels,) = plt.subplots(1, stacks, figsize=(3.5 * stacks, 2.8), sharey=True, squeeze=False)
    for axes, (stack, of_stack) in zip(panels, history["allocation"].items(), strict=True):
        counts = np.array(of_stack)
        layers = np.arange(1, len(counts) + 1)
        for number, task in enumerate(tasks):
            axes.bar(layers, counts[:, number], bottom=counts[:, :number].sum(axis=1), label=task, color=f"C{number}")
        axes.set(title=stack, xlabel="sparse layer", xticks=layers)
    panels[0].set_ylabel("experts")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(tasks))
    figure.suptitle(f"{history['name']}: experts from each task")
    save_figure(figure, path)


def over_epochs(
    groups: dict[str, dict[str, dict[str, list[list[float]]]]],
    ylabels: dict[str, str],
    path: Path,
    goal: str = "",
) -> None:
    """Curves over epochs, before training at 0: a row of panels a group, a panel a quantity, a line a configuration.

    Args:
        groups: group -> quantity -> configuration -> a curve a seed; drawn are their mean and standard deviation.
        ylabels: quantity -> what its axis says.
        goal: the quantity that has a dotted line at 1.
    """
    quantities = list(ylabels)
    size = (3.1 * len(quantities), 2.7 * len(groups))
    figure, panels = plt.subplots(len(groups), len(quantities), figsize=size, squeeze=False)
    for line, (group, curves_of) in zip(panels, groups.items(), strict=True):
        for axes, quantity in zip(line, quantities, strict=True):
            for number, (label, curves) in enumerate(curves_of[quantity].items()):
                if not curves:  # a baseline whose start nobody has measured
                    continue
                values = np.array(curves)
                mean, epochs = values.mean(axis=0), np.arange(values.shape[1])
                width = max(3.0 - 0.5 * number, 1.0)  # what is the same for two stays visible
                axes.plot(epochs, mean, marker="o", ms=3, lw=width, color=f"C{number}", label=label)
                if len(values) > 1:
                    sd = values.std(axis=0, ddof=1)
                    axes.fill_between(epochs, mean - sd, mean + sd, color=f"C{number}", alpha=0.12, lw=0)
            if quantity == goal:
                axes.axhline(1.0, color="0.3", lw=0.8, ls=":")
            axes.set(title=f"{group}: {quantity}", xlabel="epoch", ylabel=ylabels[quantity])
            axes.xaxis.get_major_locator().set_params(integer=True)
        line[0].legend(fontsize=7)
    save_figure(figure, path)


def cka(pairs: dict[str, list[dict[str, Any]]], tasks: Sequence[str], path: Path) -> None:
    """Layer-wise CKA (paper, figures 2 and 4): a row a pair, a panel a stack; a curve a task, dashed before and solid
    after fine-tuning, the mean over seeds.

    Args:
        pairs: pair -> for each seed {"before": {task: {stack: [layer]}}, "after": ...}.
    """
    stacks = list(next(iter(pairs.values()))[0]["after"][tasks[0]])
    size = (3.5 * len(stacks), 2.4 * len(pairs))
    figure, panels = plt.subplots(len(pairs), len(stacks), figsize=size, sharey=True, squeeze=False)
    for line, (pair, seeds) in zip(panels, pairs.items(), strict=True):
        for axes, stack in zip(line, stacks, strict=True):
            for number, task in enumerate(tasks):
                for when, style in (("before", "--"), ("after", "-")):
                    values = np.mean([one[when][task][stack] for one in seeds], axis=0)
                    layers = np.arange(1, len(values) + 1)
                    label = task if when == "after" else None
                    axes.plot(layers, values, style, marker="o", ms=3, lw=1.2, color=f"C{number}", label=label)
            axes.set(title=f"{pair}: {stack}", xlabel="layer", ylim=(-0.03, 1.03), xticks=layers)
        line[0].set_ylabel("linear CKA")
    handles, labels = panels[0][0].get_legend_handles_labels()
    for style, label in (("--", "before fine-tuning"), ("-", "after")):
        handles += panels[0][0].plot([], [], style, color="0.4")
        labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    save_figure(figure, path)


def lines_between(pairs: dict[str, list[tuple[list[float], list[float]]]], path: Path) -> None:
    """Validation loss on the line between two models, a panel a pair: thin each seed, thick the mean.

    Args:
        pairs: pair -> for each seed (points t, mean loss over tasks).
    """
    columns = 3
    rows = -(-len(pairs) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(9, 2.2 * rows), sharey=True, squeeze=False)
    for axes in panels.flat[len(pairs) :]:
        axes.set_visible(False)
    for axes, (pair, seeds) in zip(panels.flat, pairs.items(), strict=False):
        for points, losses in seeds:
            axes.plot(points, losses, color="0.6", lw=0.8)
        mean = np.mean([losses for _, losses in seeds], axis=0)
        axes.plot(seeds[0][0], mean, color="C0", lw=1.6, marker="o", ms=3)
        first, second = pair.split(" + ")
        axes.set(title=pair, xticks=[0, 0.5, 1], xticklabels=[first, "soup", second])
        axes.tick_params(axis="x", labelsize=7)
        for label, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set_horizontalalignment(side)
    for line in panels:
        line[0].set_ylabel("nats a token")
    save_figure(figure, path)


def entropy_by_task(groups: dict[str, dict[str, dict[str, list[list[float]]]]], path: Path) -> None:
    """Entropy of expert use against the task: a panel a stack, a colour a group of models, a dot a seed (mean over layers).

    Args:
        groups: group -> stack -> task -> for each seed its layers' entropies.
    """
    names = list(next(iter(groups.values())))
    figure, (panels,) = plt.subplots(1, len(names), figsize=(3.5 * len(names), 2.8), sharey=True, squeeze=False)
    for axes, stack in zip(panels, names, strict=True):
        for number, (group, stacks) in enumerate(groups.items()):
            tasks = list(stacks[stack])
            shift = (number - (len(groups) - 1) / 2) * 0.18
            means = [np.mean([np.mean(layers) for layers in stacks[stack][task]]) for task in tasks]
            axes.plot(np.arange(len(tasks)) + shift, means, "_", ms=16, mew=2, color=f"C{number}", label=group)
            for place, task in enumerate(tasks):
                values = [np.mean(layers) for layers in stacks[stack][task]]
                axes.plot([place + shift] * len(values), values, "o", ms=3, color=f"C{number}", alpha=0.6)
        axes.set(title=stack, xticks=range(len(tasks)), xticklabels=tasks, xlim=(-0.5, len(tasks) - 0.5))
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("normalised entropy (mean over layers)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
    save_figure(figure, path)


def entropy_by_length(tasks: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Entropy against the length that inputs are cut to: panels stack x way of counting, a curve a task.

    Args:
        tasks: task -> for each seed the rows of tools/count_expert_usage.py.
    """
    figure, panels = plt.subplots(2, 2, figsize=(7, 5), sharey="row", sharex=True)
    for line, stack in zip(panels, ("encoder", "decoder"), strict=True):
        for axes, counting in zip(line, ("paper", "released"), strict=True):
            for number, (task, seeds) in enumerate(tasks.items()):
                rows = [[row for row in one if row["counting"] == counting] for one in seeds]
                lengths = [np.mean([one[i]["mean_length"] for one in rows]) for i in range(len(rows[0]))]
                curves = np.array([[np.mean(row["entropy"][stack]) for row in one] for one in rows])
                axes.plot(lengths, curves.mean(axis=0), "o-", ms=3, lw=1.4, color=f"C{number}", label=task)
                for curve in curves if len(curves) > 1 else ():
                    axes.plot(lengths, curve, lw=0.5, color=f"C{number}", alpha=0.5)
            means = {"paper": "real tokens, before the cut", "released": "all positions, after the cut"}
            axes.set(title=f"{stack}: {means[counting]}", ylim=(0, 1.02))
        line[0].set_ylabel("normalised entropy")
    for axes in panels[1]:
        axes.set_xlabel("mean tokens of the inputs, cut")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(tasks))
    save_figure(figure, path)


def overall_by_method(values: dict[str, Sequence[float]], path: Path) -> None:
    """Overall of each method: a line a method from the top, a dot a seed, a bar at the mean; 1 is the single-task models."""
    figure, axes = plt.subplots(figsize=(5.5, 0.6 + 0.22 * len(values)))
    for place, seeds in enumerate(values.values()):
        axes.plot(seeds, [place] * len(seeds), "o", ms=3.5, color="C0", alpha=0.6)
        axes.plot([np.mean(seeds)], [place], "|", ms=11, mew=2, color="C0")
    axes.axvline(1.0, color="0.3", lw=0.8, ls=":")
    axes.set(
        yticks=range(len(values)),
        yticklabels=list(values),
        xlabel="Overall (score / single-task score)",
        xlim=(0, None),
    )
    axes.invert_yaxis()
    save_figure(figure, path)


def routing(history: dict[str, Any], path: Path) -> None:
    """Heat map of WEMoE's routing on test: a panel a task's inputs; layer x task vector, the mean weight it gets.

    Args:
        history: with "routing", {layer: {task of the inputs: [weight of each task's vector]}}.
    """
    tasks, layers = history["tasks"], list(history["routing"])
    weights = np.array([[history["routing"][layer][task] for layer in layers] for task in tasks])
    low, high = min(weights.min(), 0.0), weights.max()
    size = (1.4 + 1.9 * len(tasks), 1.2 + 0.22 * len(layers))
    figure, panels = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False)
    for axes, task, values in zip(panels[0], tasks, weights, strict=True):
        image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set(title=f"inputs of\n{task}", xticks=range(len(tasks)), yticks=range(len(layers)))
        axes.set_xticklabels(tasks, rotation=40, ha="right")
        axes.grid(False)
    names = [layer.replace(".block.", " ").split(".layer.")[0] for layer in layers]
    panels[0][0].set_yticklabels(names)
    panels[0][0].set_ylabel("feed-forward layer")
    figure.colorbar(image, ax=panels, label="weight of the task vector", shrink=0.8)
    figure.suptitle(history["name"])
    save_figure(figure, path)


def save_figure(figure, path: Path, **how: Any) -> None:
    """Write a figure, whole or not at all, in the format of the path's ending, and close it; `how` goes to savefig."""
    kind = path.suffix[1:]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None, **how)
    plt.close(figure)
