"""Figures of neighbours/WEMoE_text.py that no other experiment of WEMoE has."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from expert_merging.report.figures import plt, save_figure


def number(curves: Mapping[str, Mapping[int, Sequence[float | None]]], path: Path) -> None:
    """{method: {number of tasks: relative accuracy of each seed}} as lines of means; bars from lowest to highest seed."""
    figure, axes = plt.subplots(figsize=(5.6, 3.4))
    for place, (method, by_number) in enumerate(curves.items()):
        shift = 0.04 * (place - (len(curves) - 1) / 2)
        counts = sorted(by_number)
        found = [[value for value in by_number[n] if value is not None] for n in counts]
        points = [(n, own) for n, own in zip(counts, found, strict=True) if own]
        x = [n + shift for n, _ in points]
        axes.plot(x, [np.mean(own) for _, own in points], "o-", ms=3.5, color=f"C{place}", label=method)
        axes.vlines(
            x, [min(own) for _, own in points], [max(own) for _, own in points], color=f"C{place}", lw=1, alpha=0.6
        )
    axes.set(
        xlabel="tasks merged", ylabel="relative accuracy, %", xticks=sorted({n for one in curves.values() for n in one})
    )
    figure.legend(loc="outside right center", fontsize=7)
    save_figure(figure, path)


def robustness(spoilt: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]], path: Path) -> None:
    """{method: for each seed {way: {task: accuracy}}} as points by way, mean over tasks and seeds."""
    ways = list(next(iter(spoilt.values()))[0])
    figure, axes = plt.subplots(figsize=(1.5 + 0.75 * len(ways), 3.4))
    for place, (method, seeds) in enumerate(spoilt.items()):
        values = [100 * np.mean([np.mean(list(one[way].values())) for one in seeds]) for way in ways]
        axes.plot(range(len(ways)), values, "o-", ms=3.5, lw=0.8, color=f"C{place}", label=method)
    axes.set(ylabel="accuracy, %", xticks=range(len(ways)))
    axes.set_xticklabels([way.replace("_", " ") for way in ways], rotation=30, ha="right")
    figure.legend(loc="outside right center", fontsize=7)
    save_figure(figure, path)


def coefficients(curves: Mapping[str, Sequence[Sequence[Sequence[float]]]], path: Path) -> None:
    """{method: for each seed [[coefficient, relative accuracy on validation], ..]} as lines of means."""
    figure, axes = plt.subplots(figsize=(5.6, 3.4))
    shown: list[list[float]] = []
    for method, seeds in curves.items():
        mean = np.mean(np.array(seeds), axis=0)
        if mean[:, 1].tolist() in shown:  # what adapts has task arithmetic's curve
            continue
        shown.append(mean[:, 1].tolist())
        axes.plot(mean[:, 0], 100 * mean[:, 1], "o-", ms=3, label=method)
    axes.set(xlabel="coefficient", ylabel="relative accuracy on validation, %")
    figure.legend(loc="outside right center", fontsize=7)
    save_figure(figure, path)
