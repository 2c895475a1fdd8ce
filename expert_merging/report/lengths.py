"""How long inputs and targets are: a table from the manifests of features, a histogram from the features."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

_QUANTILES = {"50": "50%", "90": "90%", "99": "99%", "100": "max"}


def length_table(manifests: dict[str, dict[str, Any]]) -> str:
    """One line for each split of each task: examples, quantiles of the lengths (tokens, before cutting), share cut."""
    sides = [f"{side} {name}" for side in ("input", "target") for name in (*_QUANTILES.values(), "cut")]
    lines = [["task", "split", "examples", *sides, "odd"]]
    for task_name, manifest in manifests.items():
        for split, report in manifest["splits"].items():
            line = [task_name, split, f"{report['examples']:,}"]
            for side in ("input", "target"):
                line += [f"{report[f'{side}_length'][q]:,}" for q in _QUANTILES] + [f"{report[f'{side}_cut']:.1%}"]
            lines.append([*line, str(report["odd"])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:  # names to the left, numbers to the right
        line[:2] = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        line[2:] = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
    return "\n".join(map("  ".join, lines))


def length_histogram(features: dict[str, Any], constants: SimpleNamespace, path: Path) -> None:
    """Save a PNG: for each task ({name: DatasetDict}) how long the training inputs and targets are, as stored."""
    import numpy as np

    from expert_merging.report.figures import plt, save_figure

    figure, grid = plt.subplots(len(features), 2, figsize=(8, 2.1 * len(features)), squeeze=False)
    sides = (
        ("inputs", "input_ids", constants.max_input_length, "C0"),
        ("targets", "labels", constants.max_decoder_length, "C1"),
    )
    for axes_of_task, (task_name, splits) in zip(grid, features.items(), strict=True):
        for axes, (side, column, limit, color) in zip(axes_of_task, sides, strict=True):
            arrow = splits["train"].select_columns(column).with_format("arrow")
            pieces = [batch[column].combine_chunks().value_lengths() for batch in arrow.iter(batch_size=10_000)]
            values = np.concatenate([piece.to_numpy(zero_copy_only=False) for piece in pieces])
            axes.hist(values, bins=min(60, int(values.max() - values.min()) + 1), color=color)
            axes.axvline(limit, color="0.4", linestyle="--", linewidth=1)
            axes.set_title(f"{task_name}, {side}: cut at {limit}")
            axes.set(xlabel="tokens with </s>", ylabel="training examples", xlim=(0, 1.05 * limit))
    save_figure(figure, path)
