"""Tables and the figure of how far fine-tuning moved a model's modules (analysis/movement.py)."""

from pathlib import Path
from typing import Any

import numpy as np

from expert_merging.report.figures import plt, save_figure
from expert_merging.report.tables import Stat, Table

MEASURES = {"distance": "L2 distance", "per_parameter": "distance a parameter", "cosine": "cosine"}
STYLES = {"attention": "C0", "feed-forward": "C1", "norm": "C2", "other": "C3", "embeddings": "C4"}


def rows_of(moved: dict[Any, Any]) -> list[dict[str, Any]]:
    """What `movement` found, as JSON, a row a part; stacks together, layers ascending, what is in no layer last."""
    order = sorted(moved, key=lambda part: (part.layer is None, part.stack, part.layer or 0, part.kind))
    return [
        {
            **vars(part),
            "parameters": moved[part].parameters,
            **{measure: getattr(moved[part], measure) for measure in MEASURES},
        }
        for part in order
    ]


def table(found: dict[str, list[dict[str, Any]]]) -> Table:
    """A row a part; a number over several fine-tuned models is their mean and standard deviation."""
    made = Table(
        "movement", "What fine-tuning moves", "L2 distance from the pre-trained weights, the same over the square "
    )
    made.note += "root of the parameters, and the cosine, over all weights of the part; mean and deviation over models."
    for key, rows in _parts(found).items():
        stack, layer, kind = key
        numbers = {MEASURES["distance"]: Stat(tuple(row["distance"] for row in rows), 4)}
        numbers[MEASURES["per_parameter"]] = Stat(tuple(row["per_parameter"] for row in rows), 7)
        numbers[MEASURES["cosine"]] = Stat(tuple(row["cosine"] for row in rows), 6)
        place = {"stack": stack, "layer": "" if layer is None else layer, "kind": kind}
        made.rows.append(place | {"parameters": rows[0]["parameters"]} | numbers | {"from": "movement.json"})
    return made


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A row of panels a stack: each measure against the layer, a line a kind of module, dots the fine-tuned models."""
    stacks = list(dict.fromkeys(stack for stack, layer, _ in _parts(found) if layer is not None))
    figure, panels = plt.subplots(len(stacks), 3, figsize=(9, 0.6 + 2.4 * len(stacks)), squeeze=False)
    for axes, stack in zip(panels, stacks, strict=True):
        for panel, (measure, label) in zip(axes, MEASURES.items(), strict=True):
            for kind, color in STYLES.items():
                layers = {
                    layer + 1: [row[measure] for row in rows]
                    for (own, layer, what), rows in _parts(found).items()
                    if (own, what) == (stack, kind) and layer is not None
                }
                if layers:
                    panel.plot(
                        list(layers), [np.mean(values) for values in layers.values()], "-", color=color, label=kind
                    )
                for layer, values in layers.items():
                    panel.plot([layer] * len(values), values, "o", ms=2.5, color=color, alpha=0.5)
            panel.set(xlabel="layer", ylabel=label)
        axes[1].set(title=stack)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=7)
    save_figure(figure, path)


def _parts(found: dict[str, list[dict[str, Any]]]) -> dict[tuple, list[dict[str, Any]]]:
    """{(stack, layer, kind): that row of every model}."""
    parts: dict[tuple, list[dict[str, Any]]] = {}
    for rows in found.values():
        for row in rows:
            parts.setdefault((row["stack"], row["layer"], row["kind"]), []).append(row)
    return parts
